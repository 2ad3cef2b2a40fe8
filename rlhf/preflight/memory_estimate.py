"""How many bytes a run needs for weights and what belongs to them, by place; activations and caches are beside it.

Pure arithmetic on a configuration and on counts of elements: imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import ModelRewardConfig, Precision, RunConfig, VllmRolloutConfig
from rlhf.config.algo import AlgoConfig
from rlhf.config.model import AUTO
from rlhf.config.trainer import ShardedConfig
from transfer.config import CollectiveConfig, DiskConfig, IpcConfig, LocalConfig, Staging, Take

FLOAT32 = 4  # bytes
BUCKETS = 2  # of a broadcast, that are held

Parts = dict[str, int]  # bytes by what they are for


@dataclass(frozen=True, slots=True)
class Count:
    """Weights of one dtype; tied ones count once."""

    elements: int
    tensors: int
    itemsize: int  # bytes an element

    @property
    def nbytes(self) -> int:
        """The weights alone."""
        return self.elements * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the estimate must know of a policy."""

    policy: Count  # with its adapter, if it has one
    learning: Count  # all of it, or the adapter
    backbone: Count  # what a reward model and a critic copy: all but an output layer of its own
    hidden: int  # inputs of a critic's or a reward model's head
    slot: int  # bytes of what an update carries, in the workers' dtype
    layers: int = 0  # elements of all decoder layers
    largest: int = 0  # elements of the largest of them
    loaded_rewards: int = 0  # bytes of reward models that are not trained here
    saved: int = FLOAT32  # bytes of an element of what is left in the end


def gradients(learning: Count, masters: bool) -> int:
    """Bytes of all gradients: fp32 where they are added up in the masters'."""
    return learning.elements * (FLOAT32 if masters else learning.itemsize)


def optimizer_state(learning: Count, masters: bool) -> int:
    """Bytes of AdamW's two moments and its step counts, and of fp32 masters of weights that are coarser."""
    width = FLOAT32 if masters else learning.itemsize
    coarse = masters and learning.itemsize < FLOAT32
    return 2 * learning.elements * width + FLOAT32 * learning.tensors + coarse * FLOAT32 * learning.elements


def value_head(sizes: Sizes, bias: bool) -> Count:
    """The backbone under a scalar head: a critic, whose head has a bias, or a reward model, whose head has none."""
    backbone = sizes.backbone
    return Count(backbone.elements + sizes.hidden + bias, backbone.tensors + 1 + bias, backbone.itemsize)


def reference(config: RunConfig, sizes: Sizes) -> Parts:
    """A copy of the policy, and the fp32 average that one of past policies rounds; an adapter's base needs neither."""
    if not isinstance(config.algo, AlgoConfig) or not config.algo.kl_coef or config.model.lora.rank:
        return {}
    average = {"reference, fp32 average": averages(config, sizes)} if sizes.policy.itemsize < FLOAT32 else {}
    return {"reference": sizes.policy.nbytes} | average


def averages(config: RunConfig, sizes: Sizes) -> int:
    """Bytes of a moving average of policies, fp32; of an fp32 policy it is the reference, saved twice."""
    moves = isinstance(config.algo, AlgoConfig) and config.algo.ref_decay is not None
    return moves * FLOAT32 * sizes.policy.elements


def critic(config: RunConfig, sizes: Sizes) -> Parts:
    """A critic with an optimiser of its own, where the algorithm has one."""
    if not isinstance(config.algo, AlgoConfig) or not config.algo.has_critic:
        return {}
    model, masters = value_head(sizes, bias=True), config.optim.master_weights
    return {
        "critic": model.nbytes,
        "critic, gradients": gradients(model, masters),
        "critic, optimiser": optimizer_state(model, masters),
    }


def trained_reward(config: RunConfig, sizes: Sizes) -> int:
    """Bytes of the reward model that the run trains; 0 where it trains none."""
    parts = config.reward.weighted().values()
    trains = any(isinstance(part.reward, ModelRewardConfig) and part.reward.path is None for part in parts)
    return value_head(sizes, bias=False).nbytes if trains else 0


def slots(config: RunConfig, sizes: Sizes) -> Parts:
    """What the trainer holds for the transfer, beside the weights themselves."""
    match config.transfer:
        case IpcConfig(staging=Staging.arena, slots=count):
            return {f"transfer, {count} slots": count * sizes.slot}
        case CollectiveConfig() as transfer:
            return {f"transfer, {BUCKETS} buckets": BUCKETS * min(transfer.bucket_bytes, sizes.slot)}
        case DiskConfig():
            return {"transfer, while it writes": sizes.slot}
    return {}


def trainer(config: RunConfig, sizes: Sizes, ranks: int = 1) -> Parts:
    """What the trainer's process, or the first of its ranks, holds, or its GPU."""
    if isinstance(config.trainer, ShardedConfig) and ranks > 1:
        return sharded(config, sizes, ranks // config.trainer.hosts)
    masters = config.optim.master_weights
    rewards = trained_reward(config, sizes) + sizes.loaded_rewards
    parts = {
        "policy": sizes.policy.nbytes,
        "gradients": gradients(sizes.learning, masters),
        "optimiser": optimizer_state(sizes.learning, masters),
        **reference(config, sizes),
        **critic(config, sizes),
        "reward model": rewards,
        **slots(config, sizes),
    }
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def sharded(config: RunConfig, sizes: Sizes, ranks: int) -> Parts:
    """What a rank holds of models that are sharded, on its GPU, or beside a CPU: shards, and what is gathered."""
    assert isinstance(config.trainer, ShardedConfig)
    parts = _gathered("policy", sizes.policy, config, sizes)
    if reference(config, sizes):
        parts |= _gathered("reference", sizes.policy, config, sizes, learns=False)
    if critic(config, sizes):
        parts |= _gathered("critic", value_head(sizes, bias=True), config, sizes)
    parts["reward model"] = trained_reward(config, sizes) + sizes.loaded_rewards
    parts |= {} if config.trainer.offload else shards(config, sizes, ranks)
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def shards(config: RunConfig, sizes: Sizes, ranks: int) -> Parts:
    """What a rank has of all models for itself, in fp32, and its slots: with `trainer.offload` on the host."""
    parts = _shards("policy", sizes.policy, ranks)
    if reference(config, sizes):
        parts["reference, shards"] = _share(FLOAT32 * sizes.policy.elements, ranks)
    if critic(config, sizes):
        parts |= _shards("critic", value_head(sizes, bias=True), ranks)
    divided = 1 if isinstance(config.transfer, CollectiveConfig) else ranks  # every rank has both buckets
    return parts | {name: _share(nbytes, divided) for name, nbytes in slots(config, sizes).items()}


def _gathered(name: str, model: Count, config: RunConfig, sizes: Sizes, learns: bool = True) -> Parts:
    """What is whole of a model while it computes: all, or all but decoder layers and two of these.

    Where rows are padded, responses go backward before their prompts, and what they add to a weight's gradient waits.
    """
    settings = config.trainer
    assert isinstance(settings, ShardedConfig)
    if not settings.by_layer:
        whole = {f"{name}, whole while it computes": model.nbytes}
        return whole | ({f"{name}, whole gradients": FLOAT32 * model.elements} if learns else {})
    at_once = min(model.elements, model.elements - sizes.layers + 2 * sizes.largest)
    kept = at_once if settings.reshard is not False else model.elements
    whole = {f"{name}, what is whole at once": model.itemsize * kept}
    if not learns:
        return whole
    waiting = 0 if _packs(config) else model.nbytes
    return whole | {f"{name}, gradients of that": FLOAT32 * at_once, f"{name}, gradients that wait": waiting}


def _packs(config: RunConfig) -> bool:
    """Whether rows are packed, if the model allows it, as it is on a GPU."""
    by_itself = config.model.attention == AUTO and config.model.dtype is Precision.bfloat16
    return by_itself or config.model.attention == "packed"


def _shards(name: str, model: Count, ranks: int) -> Parts:
    """Of a model that learns."""
    fp32 = FLOAT32 * model.elements
    return {
        f"{name}, shards and their gradients": 2 * _share(fp32, ranks),
        f"{name}, optimiser": _share(2 * fp32, ranks) + FLOAT32 * model.tensors,
    }


def _share(nbytes: int, ranks: int) -> int:
    return -(-nbytes // ranks)


def worker(config: RunConfig, sizes: Sizes) -> Parts:
    """What one worker holds of its own; vLLM takes what its `engine_args` say on top, or all of it."""
    dtype = config.rollout.dtype or config.model.dtype
    width = {"float32": FLOAT32, "bfloat16": FLOAT32 // 2}[dtype.value]
    lora = bool(config.model.lora.rank)
    base = {"base": (sizes.policy.elements - sizes.learning.elements) * width} if lora else {}
    match config.transfer:
        case LocalConfig():
            return {"weights: the trainer's own": 0}
        case IpcConfig(take=Take.view) if not isinstance(config.rollout, VllmRolloutConfig):
            return {**base, "weights: a slot of the trainer's": 0}
        case CollectiveConfig() | DiskConfig():
            return {**base, "weights": sizes.slot, "transfer, the next version": sizes.slot}
    return {**base, "weights": sizes.slot}


def checkpoint(config: RunConfig, sizes: Sizes) -> int:
    """Bytes of the tensors in one checkpoint, once a step was made."""
    masters = config.optim.master_weights
    written = sizes.learning.nbytes + optimizer_state(sizes.learning, masters) + trained_reward(config, sizes)
    kept = {name: nbytes for name, nbytes in critic(config, sizes).items() if "gradients" not in name}
    model = reference(config, sizes).get("reference", 0)
    return written + sum(kept.values()) + model + averages(config, sizes)


def disk(config: RunConfig, sizes: Sizes) -> Parts:
    """What the run has on the disk at most."""
    keeps = config.checkpoint
    count = keeps.keep + keeps.keep_best + 1 if keeps.every else 0
    lora = bool(config.model.lora.rank)
    parts = {
        f"checkpoints, {count} at most while one is written": count * checkpoint(config, sizes),
        "policy": (sizes.policy.elements - lora * sizes.learning.elements) * sizes.saved,
        "adapter": lora * sizes.learning.nbytes,
        "reward model": trained_reward(config, sizes) // sizes.policy.itemsize * sizes.saved,
    }
    if isinstance(config.transfer, DiskConfig):
        parts["transfer, versions"] = (config.transfer.keep + 1) * sizes.slot
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def human(nbytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"

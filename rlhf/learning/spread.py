"""How the models of a trainer lie over its ranks: whole in each of them, or sharded, so that each has a part of all.

Sharded models (FSDP2: `fully_shard` by decoder layer, embeddings and head in the root) are made whole for as long as
micro-batches are computed, each rank its own, however many; gradients are added up once, when all are done. So no
collective lies inside a micro-batch, and ranks may have different numbers of them, or none. Or a layer is whole only
while a pass is in it (by_layer.py): then collectives lie inside, and all ranks compute as many passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from rlhf.learning.compiled_layers import decoder_layers
from rlhf.learning.gradient_sums import add_gradients, add_in_order, take_first_weights
from rlhf.ranks.ranks import ALONE, Ranks

Model = TypeVar("Model", bound=torch.nn.Module)
Part = TypeVar("Part")
Optimizers = Sequence[torch.optim.Optimizer]


class Whole:
    """Every rank has all weights of every model."""

    sharded = False
    lockstep = False  # whether all ranks have to compute as many passes, forward and backward

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks

    def share(self, parts: Sequence[list[Part]]) -> Sequence[tuple[list[Part], bool]]:
        """What this rank computes of the parts, and whether that counts; inside `whole`."""
        return [(part, True) for part in self.ranks.share(parts)]

    def lay(self, model: Model) -> Model:
        """Let the model lie so, in place, with the weights that the first rank has of it."""
        take_first_weights(model, self.ranks)
        return model

    @contextmanager
    def whole(self, *models: torch.nn.Module | None) -> Iterator[None]:
        """Around whatever is computed with these models, gradients included."""
        yield

    def expect_last(self, models: Sequence[torch.nn.Module]) -> None:
        """The next backward pass through each of these, in this order, is this rank's last one of the update."""

    def add_gradients(self, models: Sequence[torch.nn.Module], optimizers: Optimizers) -> None:
        """Once an update, inside `whole`: from now on the gradients that the optimisers see are those of all ranks."""
        add_gradients(optimizers, self.ranks)

    def over_ranks(self, squares: float) -> float:
        """The sum of squares of a model's gradients, from that of this rank's part of them."""
        return squares


class Sharded(Whole):
    """Every rank has its rows (dim 0) of every weight, gradient and moment of an optimiser; weights in fp32.

    The ranks of each host hold all rows: of several hosts each holds the same (HSDP).
    """

    sharded = True

    def __init__(self, ranks: Ranks, device: torch.device, offload: bool = False) -> None:
        """`offload`: shards, gradients and moments are in the host's memory, where the device is a GPU."""
        super().__init__(ranks)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody changes it in place
        shape = (ranks.count,) if ranks.hosts == 1 else (ranks.hosts, ranks.holders)
        self._mesh: DeviceMesh = init_device_mesh(device.type, shape, mesh_dim_names=("host", "holder")[-len(shape) :])
        self._offload = CPUOffloadPolicy() if offload and device.type == "cuda" else OffloadPolicy()
        self._added = False  # in the last backward pass

    def lay(self, model: Model) -> Model:
        """Shard the model, in place; what a model of 16 bits computes with are fp32 shards, rounded."""
        take_first_weights(model, self.ranks)
        half = next(model.parameters()).dtype
        policy = MixedPrecisionPolicy()
        if half != torch.float32:
            policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        tied = _tied(model)
        shard: Any = partial(fully_shard, mesh=self._mesh, mp_policy=policy, offload_policy=self._offload)
        for part in decoder_layers(model):
            shard(part, reshard_after_forward=self._drops_layers())
        shard(model, reshard_after_forward=False)
        if half != torch.float32:
            model.float()
        for group in groups_of(model):
            group.set_gradient_divide_factor(1.0)  # a sum, never a mean: losses are of the whole batch
            group.set_force_sum_reduction_for_comms(True)
            if self._mesh.device_type == "cpu":
                group.set_custom_reduce_scatter(_InOrder())
            self._set(group)
        assert _tied(model) == tied, "sharding has untied weights"
        with torch.no_grad(), self.whole(model), _eager():
            self._one_token(model)  # what computes first is the root for FSDP: no decoder layer is to be it
        return model

    def _drops_layers(self) -> bool:
        """Whether FSDP is to drop a layer after a forward pass."""
        return False

    def _set(self, group: FSDPModule) -> None:
        """How a group is gathered and reduced."""
        group.set_reshard_after_backward(False)
        group.set_requires_gradient_sync(False)

    @contextmanager
    def whole(self, *models: torch.nn.Module | None) -> Iterator[None]:
        """Around whatever is computed with these models, gradients included."""
        groups = [group for model in different(models) for group in groups_of(model)]
        with self.ranks.explained():
            _unshard(groups)
        try:
            yield
        finally:
            self._added = False
            for group in groups:
                group.set_requires_gradient_sync(False)
                group.reshard()
                forget_passes(group)

    def expect_last(self, models: Sequence[torch.nn.Module]) -> None:
        """Let FSDP add up the gradients in it, layer by layer, while those of earlier layers are computed."""
        self._added = True
        for model in models:
            cast("FSDPModule", model).set_requires_gradient_sync(True)

    def add_gradients(self, models: Sequence[torch.nn.Module], optimizers: Optimizers) -> None:
        """Once an update, inside `whole`: from now on the gradients that the optimisers see are those of all ranks.

        Unless that was done in the last backward pass, one token goes through each model, in the same order, and its
        loss counts nothing: FSDP reduces in a backward pass.
        """
        if self._added:
            return
        with self.ranks.explained(), torch.enable_grad(), _eager():
            for model in models:
                cast("FSDPModule", model).set_requires_gradient_sync(True)
                (self._one_token(model).float().sum() * 0.0).backward()

    def _one_token(self, model: torch.nn.Module) -> torch.Tensor:
        device = torch.device(self._mesh.device_type)
        output: Any = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    def over_ranks(self, squares: float) -> float:
        """The sum of squares of a model's gradients, from that of this rank's part of them."""
        return sum(self.ranks.gathered(squares)[: self.ranks.holders])


class _InOrder(ReduceScatter):
    """A sum in the order of ranks, whatever their number: gloo's own depends on it."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(add_in_order(input_tensor, dist.get_world_size(group), group))


def _unshard(groups: Sequence[FSDPModule]) -> None:
    """Gather one group while the one before is put in its place; no more at a time, as each has buffers."""
    under_way: list[Any] = []
    for group in groups:
        under_way.append(group.unshard(async_op=True))
        if len(under_way) > 1:
            under_way.pop(0).wait()
    for handle in under_way:
        handle.wait()


def groups_of(model: torch.nn.Module) -> list[FSDPModule]:
    """What is gathered at once: the root's own weights, and those of each layer."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def different(models: Sequence[torch.nn.Module | None]) -> list[torch.nn.Module]:
    """Each of them once."""
    return list({id(model): model for model in models if model is not None}.values())


def forget_passes(group: FSDPModule) -> None:
    """FSDP notes each forward pass, for its backward pass to come, and forgets none that has no gradient."""
    state: Any = group._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    if state._fsdp_param_group is not None:
        state._fsdp_param_group._post_forward_indices.clear()


def _tied(model: torch.nn.Module) -> bool:
    """Whether one tensor is both the embeddings and the head."""
    head, embeddings = (
        getattr(model, get, lambda: None)() for get in ("get_output_embeddings", "get_input_embeddings")
    )
    return head is not None and embeddings is not None and head.weight is embeddings.weight


def _eager() -> Any:
    """A pass of another shape than all others is not worth compiling."""
    return torch.compiler.set_stance("force_eager") if torch.cuda.is_available() else nullcontext()

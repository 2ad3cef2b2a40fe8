"""trainer.gather=auto: once an update where a GPU has the memory, and what is said of it; what cannot be obeyed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hydra.errors import CompactHydraException

from rlhf.check import _places
from rlhf.config.trainer import LAYER, STEP, ShardedConfig
from rlhf.preflight.gathering import announced, chosen, settled
from rlhf.preflight.memory_estimate import Count, Sizes, shards, trainer

GB = 10**9
BILLION = 10**9
H200 = 150 * GB  # 139.8 GiB
SHARDED = ("trainer=sharded", "model.dtype=bfloat16", "reward=verifier", "algo.kl_coef=0")


def sizes(billions: float) -> Sizes:
    """Of a model in bfloat16 with 50 layers, which have nine tenths of it."""
    model = Count(int(billions * BILLION), 500, 2)
    layers = int(0.9 * model.elements)
    learning = {"policy": model, "learning": model, "backbone": model, "slot": model.nbytes}
    return Sizes(**learning, hidden=4096, layers=layers, largest=layers // 50)


@pytest.fixture
def composed(compose_run):
    def compose(*overrides: str):
        return compose_run(*SHARDED, *overrides)

    return compose


@pytest.mark.parametrize(
    ("billions", "ranks", "overrides", "gather"),
    [
        (1.5, 2, (), STEP),
        (7, 2, (), STEP),  # 112 GB, slots included
        (7, 2, ("algo.kl_coef=0.1",), LAYER),  # 28 more
        (7, 2, ("trainer.offload=true", "algo.kl_coef=0.1"), STEP),  # 56 of them on the host
        (14, 8, ("rollout=vllm", "rollout.sleep_level=1"), STEP),  # 119 GB
        (32, 8, (), LAYER),
        (7, 2, ("rollout=vllm", "rollout.gpus=[1]"), STEP),
        (7, 2, ("rollout=vllm", "rollout.sleep_level=1"), STEP),
        (7, 2, ("rollout=vllm", "rollout.engine_args={gpu_memory_utilization: 0.4}"), LAYER),
        (1.5, 2, ("rollout=vllm", "rollout.engine_args={gpu_memory_utilization: 0.4}"), STEP),
        (1.5, 2, ("rollout=vllm",), LAYER),  # vLLM takes 0.9 of a GPU, if nobody says what
        (7, 2, ("rollout.workers=4",), LAYER),  # two of them on each GPU
        (1.5, 2, ("rollout=vllm", "transfer/sender=http", "transfer.sender.url=[http://far:8000]"), STEP),
        (1.5, 2, ("trainer.gather=layer",), LAYER),
        (32, 2, ("trainer.gather=step",), STEP),
    ],
)
def test_once_an_update_where_the_estimate_fits_a_gpu_and_layer_by_layer_where_it_does_not(
    composed, billions, ranks, overrides, gather
):
    config = composed(*overrides)
    found, why = chosen(config, lambda: sizes(billions), ranks, H200)
    assert found == gather
    assert bool(why) == ("trainer.gather" not in " ".join(overrides))
    assert config.trainer.gather in ("auto", gather), "what was composed is as it was"


def test_on_a_cpu_it_is_once_an_update_however_large_the_model_is(composed):
    assert chosen(composed(), lambda: sizes(700), 2, None) == (STEP, "")


def test_the_line_says_what_was_chosen_and_why(composed):
    config = composed("trainer.reshard=false", "trainer.offload=true")
    given = config.trainer
    gather, why = chosen(config, lambda: sizes(32), 2, H200)
    told = announced(settled(given, gather, on_gpu=True), given, 2, why)
    assert told == (
        "trainer: 2 ranks, weights gathered layer by layer (gather=layer), and kept between forward and backward "
        "passes, shards in the host's memory: gather=step needs 178.81 GiB of a GPU's 139.70 GiB, and 59.14 GiB are "
        "left for it"
    )
    on_cpu = announced(settled(given, STEP, on_gpu=False), given, 3, "")
    assert on_cpu == (
        "trainer: 3 ranks, weights gathered once an update (gather=step); trainer.offload=true changes nothing on a CPU"
    )


def test_resharding_that_was_asked_for_is_of_layers_and_left_where_auto_is_none():
    given = ShardedConfig(reshard=True)
    assert settled(given, STEP, on_gpu=True).reshard is None
    assert settled(given, LAYER, on_gpu=True).reshard is True


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trainer.gather=model",), r"trainer.gather must be one of auto, step, layer \(got 'model'\)"),
        (
            ("trainer.gather=step", "trainer.reshard=true"),
            r"leave out trainer.reshard=true, or set trainer.gather=layer",
        ),
        (("trainer.offload=true", "transfer=nccl"), r"set transfer=ipc, disk or gloo, or trainer.offload=false"),
    ],
)
def test_keys_that_cannot_be_obeyed_are_refused_in_one_line(composed, overrides, said):
    with pytest.raises(CompactHydraException, match=said):
        composed(*overrides)


def test_what_is_offloaded_is_counted_on_the_host_and_not_on_the_gpu(composed):
    words = ("algo=ppo", "algo.kl_coef=0.1", "trainer.gather=layer", "rollout=vllm", "rollout.sleep_level=1")
    config, counted = composed(*words), sizes(7)
    held = trainer(config, counted, 4)
    config.trainer = replace(config.trainer, offload=True)
    on_gpu, on_host = trainer(config, counted, 4), shards(config, counted, 4)
    assert on_host and on_gpu and not on_gpu.keys() & on_host.keys()
    assert {name: nbytes for name, nbytes in held.items() if nbytes} == on_gpu | on_host
    assert {name.partition(", ")[2] for name in on_gpu} == {"what is whole at once", "gradients of that"}
    assert {name.partition(",")[0] for name in on_host} == {"policy", "reference", "critic", "transfer"}
    told = _places(config, counted, "cuda:0", 4)
    assert list(told)[:2] == ["each of the trainer's 4 ranks, the first on cuda:0", "each of these, on its host"]
    assert list(told.values())[:2] == [on_gpu, on_host]
    root_and_two_layers = counted.policy.elements - counted.layers + 2 * counted.largest
    assert on_gpu["policy, what is whole at once"] == on_gpu["reference, what is whole at once"]
    assert on_gpu["policy, what is whole at once"] == 2 * root_and_two_layers
    assert on_gpu["policy, gradients of that"] == 4 * root_and_two_layers

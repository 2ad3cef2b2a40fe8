"""Which rank a process is: by the configuration, by torchrun, and what does not fit together in one line."""

from __future__ import annotations

import pytest
import torch
from hydra.errors import CompactHydraException

from rlhf.ranks.place import TORCHRUN, Place, by_torchrun, place_of


def environment(number: int, count: int, local: int | None = None) -> dict[str, str]:
    """What torchrun gives a process."""
    values = (number, count, number if local is None else local, "127.0.0.1", 29500)
    return dict(zip(TORCHRUN, map(str, values), strict=True))


@pytest.fixture
def place(compose_run):
    """`place("trainer=replicas", ..., environment={}) -> Place`."""

    def of(*overrides: str, environment: dict[str, str] | None = None) -> Place:
        config = compose_run("experiment=smoke", *overrides)
        return place_of(config.trainer, config.model, environment or {})

    return of


def test_without_torchrun_the_configuration_says_how_many_ranks_there_are_and_this_is_the_first(place):
    assert place("trainer=one") == Place(0, 1)
    assert place("trainer=replicas", "trainer.ranks=3") == Place(0, 3)


def test_torchrun_says_which_rank_a_process_is_and_which_gpu_of_its_host_it_has(place):
    assert by_torchrun(environment(5, 8, local=1)) == Place(5, 8, 1, torchrun=True)
    assert by_torchrun({name: "1" for name in TORCHRUN[:-1]}) is None, "others set some of the names, too"
    for ranks in ("auto", "8"):
        found = place("trainer=replicas", f"trainer.ranks={ranks}", environment=environment(0, 8))
        assert found == Place(0, 8, torchrun=True)
    assert place("trainer=one", environment=environment(0, 1)) == Place(), "torchrun of one process changes nothing"


@pytest.mark.parametrize(
    ("overrides", "given", "said"),
    [
        ("trainer=one", environment(0, 2), "torchrun has started 2 processes, and trainer=one is one: set trainer=rep"),
        ("trainer=replicas trainer.ranks=3", environment(0, 2), r"trainer.ranks must be as many, or auto \(got 3\)"),
        (
            "trainer=replicas model.device=cpu",
            {},
            "trainer.ranks=auto takes the GPUs that are there, and",
        ),
        (
            "trainer=replicas trainer.gpus=[0,1]",
            environment(0, 4),
            r"started 4 processes on each host \(trainer.hosts=1\): trainer.gpus must name as many \(got \[0, 1\]\)",
        ),
    ],
)
def test_a_number_of_ranks_that_cannot_be_is_refused_in_one_line(place, overrides, given, said):
    with pytest.raises(ValueError, match=said):
        place(*overrides.split(), environment=given)


def test_auto_is_a_rank_for_each_gpu_that_is_there(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert place("trainer=replicas") == Place(0, 4)
    assert place("trainer=replicas", "trainer.gpus=[1,3]") == Place(0, 2), "or for each that is named"
    on_each = place("trainer=replicas", "trainer.gpus=[1,3]", "trainer.hosts=2", environment=environment(0, 4))
    assert on_each == Place(0, 4, torchrun=True, hosts=2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.ranks=0", "trainer.ranks must be at least 1"),
        ("trainer.ranks=two", r"trainer.ranks must be auto or a whole number \(got 'two'\)"),
        ("trainer.ranks=1.5", r"trainer.ranks must be auto or a whole number \(got 1.5\)"),
        ("trainer.ranks=true", "trainer.ranks must be auto or a whole number"),
        ("trainer.timeout_s=0", "trainer.timeout_s must be"),
    ],
)
def test_a_trainer_that_cannot_be_is_refused_with_its_key(compose_run, override, said):
    with pytest.raises(CompactHydraException, match=said):
        compose_run("trainer=replicas", override)


def test_ranks_of_one_process_are_refused_with_the_trainers_that_have_several(compose_run):
    said = r"trainer=one is one process: set trainer.ranks=1, or trainer=replicas or sharded \(got 2\)"
    with pytest.raises(CompactHydraException, match=said):
        compose_run("trainer.ranks=2")

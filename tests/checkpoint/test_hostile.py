"""Checkpoints that are not what was written: the one before is taken, or one line says why; none is waited for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.checkpoint.keeper import CONFIG, ROWS, STATE, Saved
from rlhf.checkpoint.shards import stored, write_tensors
from rlhf.checkpoint.state import State, load_optimizer, load_state, optimizer_tensors, random_state, restore_random
from rlhf.checkpoint.store import MANIFEST, MOST_JSON, Best, Store, _seal
from rlhf.config import AdamWConfig
from rlhf.learning.optimizer import make_optimizer

TOLD = {"step": 2, "version": 2, "epoch": 1, "samples": 0, "attributes": {}, "random": {}, "notes": {}, "seconds": 1.0}


@pytest.fixture
def store(tmp_path):
    """Steps 1 and 2."""
    made = Store(tmp_path / "checkpoints")
    for step in (1, 2):

        def write(folder: Path, step: int = step) -> None:
            (folder / "policy").mkdir()
            (folder / "policy" / "weights").write_text(f"weights of {step}")
            (folder / STATE).write_text(json.dumps(TOLD | {"step": step}))
            (folder / ROWS).write_text('{"step": 1}\n')
            (folder / CONFIG).write_text("{}")

        made.save(step, write)
    return made


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def lists(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def moved(folder: Path) -> None:
    (folder / "policy").rename(folder.parent.parent / "elsewhere")
    (folder / "policy").symlink_to(folder.parent.parent / "elsewhere")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: fifo(folder / STATE), "state.json: neither a file nor a folder"),
        (lambda folder: fifo(folder / MANIFEST), f"{MANIFEST}: it is no file"),
        (lambda folder: link(folder / STATE, "/dev/zero"), "state.json: neither a file nor a folder"),
        (lambda folder: link(folder / MANIFEST, "/dev/zero"), f"{MANIFEST}: it is no file"),
        (lambda folder: lists(folder, "/dev/zero"), "zero: No such file or directory"),
        (lambda folder: lists(folder, "../00000001/state.json"), "state.json: No such file or directory"),
        (moved, "policy: neither a file nor a folder"),
        (lambda folder: (folder / "policy" / "model.py").write_text(""), "policy/model.py: not what was written"),
        (lambda folder: (folder / STATE).write_bytes(bytes(10**6)), "state.json: not the bytes that were written"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 10**5), f"{MANIFEST}: it cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[1]"), f"{MANIFEST}: it cannot be read"),
        (lambda folder: os.truncate(folder / MANIFEST, MOST_JSON + 1), f"{MANIFEST}: it cannot be read"),
    ],
)
def test_what_was_not_written_there_is_passed_over_and_never_waited_for(store, harm, fault):
    harm(store.path(2))
    assert store.newest() == 1 and store.damaged == {2: fault}


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        (STATE, "[" * 10**5, "state.json is nested too deeply"),
        (STATE, "[]", "state.json: it has no step as a run has it"),
        (STATE, json.dumps(TOLD | {"samples": "x"}), "state.json: it has no samples as a run has it"),
        (STATE, json.dumps(TOLD | {"notes": {"summary": 1}}), "state.json: it has no summary as a run has it"),
        (ROWS, "[1]\n", "rows.jsonl: a row is none of a run's"),
        (ROWS, "[" * 10**5, "rows.jsonl: nested too deeply"),
        (ROWS, "{", "Expecting property name"),
    ],
)
def test_a_sealed_checkpoint_that_is_no_run_s_is_passed_over_too(store, name, text, fault):
    (store.path(2) / name).write_text(text)
    (store.path(2) / MANIFEST).unlink()
    _seal(store.path(2), 2, {})
    assert store.newest() == 2, "its bytes are what the manifest says"
    assert store.newest(Saved.fault_in) == 1 and store.damaged[2].startswith(fault)


@pytest.mark.timeout(20)
def test_a_best_evaluation_that_cannot_be_read_is_none(store):
    store.note_best(Best(2, 0.5))
    (store.folder / "best.json").write_text("[" * 10**5)
    assert store.best() is None
    fifo(store.folder / "best.json")
    assert store.best() is None


# --- tensors ----------------------------------------------------------------------------------------------------------


class Owner:
    steps = 3


def state() -> tuple[State, torch.nn.Linear]:
    module = torch.nn.Linear(3, 3)
    optimizer = make_optimizer(module, AdamWConfig(), 1e-3)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    averages = {"average": torch.zeros(3)}
    owner = Owner()
    return State(
        {"critic": module}, {"critic": (module, optimizer)}, {"averages": averages}, {"n": (owner, "steps")}
    ), module


@pytest.fixture
def written(tmp_path):
    """`written("critic", weight=...)`: a folder with a state, of one file of which some tensors are others."""

    def folder(name: str, **others: torch.Tensor) -> Path:
        for file, tensors in state()[0].files():
            save_file(
                {key: tensor.detach().clone() for key, tensor in tensors.items()}, tmp_path / f"{file}.safetensors"
            )
        tensors = load_file(tmp_path / f"{name}.safetensors")
        renamed = {key.replace("__", "/"): tensor for key, tensor in others.items()}
        assert renamed.keys() <= tensors.keys(), tensors.keys()
        save_file(tensors | renamed, tmp_path / f"{name}.safetensors")
        return tmp_path

    return folder


@pytest.mark.parametrize(
    ("name", "others", "said"),
    [
        ("critic", {"bias": torch.ones(1)}, r"bias is torch.float32 \[1\], and must be torch.float32 \[3\]"),
        ("critic", {"weight": torch.ones(3)}, r"weight is torch.float32 \[3\], and must be torch.float32 \[3, 3\]"),
        ("critic", {"bias": torch.ones(3, dtype=torch.int64)}, r"bias is torch.int64 \[3\], and must be"),
        ("critic", {"bias": torch.ones(3, dtype=torch.float64)}, r"bias is torch.float64 \[3\], and must be"),
        ("averages", {"average": torch.ones(())}, r"average is torch.float32 \[\], and must be"),
        ("critic-optimizer", {"bias__exp_avg": torch.ones(1)}, r"bias/exp_avg is torch.float32 \[1\], and must be"),
        ("critic-optimizer", {"bias__step": torch.ones(3)}, r"bias/step is torch.float32 \[3\], and must be"),
    ],
)
def test_tensors_are_neither_repeated_nor_cast(written, name, others, said):
    mine, module = state()
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"does not hold what this run trains \({said}"):
        load_state(mine, written(name, **others), {"n": 4}, torch.device("cpu"))
    assert name != "critic" or "bias" in others or torch.equal(module.weight, before)


def test_what_was_written_is_loaded_as_it_was(written):
    mine, module = state()
    folder = written("averages", average=torch.ones(3))
    load_state(mine, folder, {"n": 4}, torch.device("cpu"))
    assert torch.equal(module.weight, load_file(folder / "critic.safetensors")["weight"])
    assert mine.tensors["averages"]["average"].tolist() == [1.0] * 3 and mine.attributes["n"][0].steps == 4
    write_tensors(folder / "moments.safetensors", optimizer_tensors(*mine.optimizers["critic"]))
    with stored(folder, "moments") as tensors:
        load_optimizer(mine.optimizers["critic"][1], tensors)


@pytest.mark.parametrize("value", ["4", [4], {"x": 1}, True])
def test_an_attribute_of_another_kind_is_refused(written, value):
    with pytest.raises(ValueError, match="does not hold what this run trains"):
        load_state(state()[0], written("averages"), {"n": value}, torch.device("cpu"))


@pytest.mark.parametrize(
    "change", [lambda s: s.pop("torch"), lambda s: s.update(torch="00"), lambda s: s.update(python=[3, [1], None])]
)
def test_random_generators_that_are_none_are_one_line(change: Callable):
    told = random_state()
    kept = random_state()
    change(told)
    with pytest.raises(ValueError):
        restore_random(told)
    restore_random(kept)

"""Checkpoints on the disk: whole or not there, whenever a process is killed and whichever call fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nth_fault import CALLS, Nth, failing, no_space

from rlhf.checkpoint.store import MANIFEST, REMOVING, WRITING, Best, Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "checkpoints")


def save(store: Store, step: int) -> None:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_text(f"weights of {step}")
        (folder / "state").write_text(f"state of {step}")

    store.save(step, write)


def kills(folder: Path, *how: str) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(folder), *how]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # how many there were, for `pytest -s`
    return json.loads(done.stdout)


def test_after_200_kills_at_random_the_loader_has_always_returned_the_step_being_saved_or_the_one_before(tmp_path):
    seen = kills(tmp_path, "random", "200")
    assert seen["kills"] == seen["k"] + seen["k-1"] == 200
    assert min(seen["k"], seen["k-1"], seen["in a save"]) >= 10, "they came at all moments"


def test_a_process_that_ends_at_any_call_that_changes_the_disk_leaves_the_step_being_saved_or_the_one_before(tmp_path):
    seen = kills(tmp_path, "each")
    assert seen["kills"] > 60 and min(seen["k"], seen["k-1"]) > 20


def test_whichever_call_fails_the_step_before_stays_or_the_new_one_is_there_and_the_next_is_saved(store):
    save(store, 0)
    names: set[str] = set()
    for n in range(1, 200):
        before, nth = store.newest(), Nth(n, no_space)
        assert before is not None
        with failing(nth):
            try:
                save(store, before + 1)
            except OSError as error:
                assert nth.came and "No space left" in str(error)
            store.keep_only(store.steps()[-2:])
        names |= set(nth.names)
        assert store.newest() in (before, before + 1)
        save(store, before + 2)
        assert store.newest() == before + 2
        if not nth.came:
            break
    assert n > 20 and names == {*CALLS, "create", "write"} - {"replace"}


def test_the_newest_that_verifies_is_taken_and_told_why_others_are_not(store):
    for step in range(6):
        save(store, step)
    (store.path(5) / "state").write_text("state of 6")  # as long as it was
    (store.path(4) / "policy" / "weights").unlink()
    (store.path(3) / MANIFEST).write_text("{")
    (store.path(2) / MANIFEST).write_text((store.path(1) / MANIFEST).read_text())
    assert store.newest() == 1
    assert store.damaged == {
        5: "state: not the bytes that were written",
        4: "weights: No such file or directory",
        3: f"{MANIFEST}: it cannot be read",
        2: f"{MANIFEST}: it is of step 1",
    }
    store.keep_only([])
    assert store.newest() is None and store.steps() == []


def test_a_step_that_is_saved_again_takes_the_place_of_one_that_does_not_verify(store):
    save(store, 7)
    (store.path(7) / "state").write_text("damaged")
    assert store.newest() is None
    save(store, 7)
    assert store.newest() == 7 and store.steps() == [7]


def test_what_a_killed_process_left_is_removed_at_the_next_save_and_is_never_a_checkpoint(store):
    save(store, 1)
    for prefix in (WRITING, REMOVING):
        (store.folder / f"{prefix}dead").mkdir()
        (store.folder / f"{prefix}dead" / "weights").write_text("half")
    (store.folder / f"{WRITING}best").write_text("{")
    assert store.steps() == [1] and store.newest() == 1
    save(store, 2)
    assert {path.name for path in store.folder.iterdir()} == {"00000001", "00000002"}


def test_the_best_evaluation_is_remembered_for_as_long_as_its_checkpoint_is_there(store):
    assert store.best() is None
    save(store, 3)
    store.note_best(Best(3, 0.5))
    assert Store(store.folder).best() == Best(3, 0.5)
    with failing(Nth(3, no_space)), pytest.raises(OSError):
        store.note_best(Best(3, 0.75))
    assert store.best() == Best(3, 0.5)
    store.keep_only([])
    assert store.best() is None


def test_files_and_folders_reach_the_disk_before_the_name_and_the_name_before_the_end(store, monkeypatch):
    """The order that a power failure asks for."""
    happened: list[str] = []
    rename = os.rename
    named = lambda descriptor: happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)  # noqa: E731
    monkeypatch.setattr(os, "fsync", named)
    monkeypatch.setattr(os, "rename", lambda *names: (happened.append("rename"), rename(*names)))
    save(store, 1)
    written = ["weights", "state", "policy", MANIFEST]
    first = happened.index("rename")
    assert sorted(happened[: len(written)]) == sorted(written) and happened[len(written) - 1] == MANIFEST
    assert happened[first - 1].startswith(WRITING) and happened[first + 1 :] == ["checkpoints"]

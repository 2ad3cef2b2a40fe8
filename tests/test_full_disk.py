"""A disk that is full when a run ends: one line, and nothing lost that was there; and a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from rlhf.assembly.site import opened
from rlhf.checkpoint.keeper import FOLDER
from rlhf.checkpoint.store import Store
from rlhf.checkpoint.whole import whole
from rlhf.ranks.place import Place
from rlhf.run import run
from rlhf.shell.ending import RunError

SMALL = ("experiment=smoke", "model=micro", "transfer=local", "sft.steps=1", "prompts_per_step=2", "steps=1")
SHORT = ("task.held_out=4", "task.prompts=64", "rollout.max_new_tokens=4", "logger=[console]")


@pytest.fixture
def disk(tmp_path):
    """`disk(kib)`: a folder on a disk of that size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(kib: int) -> Path:
        if os.system(f"mount -t tmpfs -o size={kib}k none {place} 2>/dev/null"):
            pytest.skip("a tmpfs cannot be mounted here")
        return place

    yield mounted
    os.system(f"umount -l {place} 2>/dev/null")  # weights that were read may be mapped still


def fill(place: Path, left: int) -> None:
    room = os.statvfs(place)
    (place / "ballast").write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - left)))


def test_a_policy_that_cannot_be_written_is_one_line_and_the_one_before_stays(compose_run, disk):
    place = disk(4096)
    run(compose_run(*SMALL, *SHORT), place / "run")
    before = (place / "run" / "policy" / "model.safetensors").read_bytes()
    fill(place, 20_000)
    with pytest.raises(RunError, match=r"run/policy/ cannot be written \(.*No space left.*\): make room") as ended:
        run(compose_run(*SMALL, *SHORT, "steps=2"), place / "run", resume=True)
    assert "\n" not in str(ended.value)
    assert (place / "run" / "policy" / "model.safetensors").read_bytes() == before
    assert not list((place / "run").glob(".writing*")) and Store(place / "run" / FOLDER).newest() == 1
    (place / "ballast").unlink()
    run(compose_run(*SMALL, *SHORT, "steps=2"), place / "run", resume=True)
    assert (place / "run" / "policy" / "model.safetensors").read_bytes() != before


def test_a_plot_that_finds_no_room_is_a_warning_and_the_run_is_finished(compose_run, disk, drawn, capsys):
    place = disk(4096)
    (place / "run").mkdir()
    fill(place, 100_000)  # most of which policy/ takes
    run(compose_run(*SMALL, *SHORT, "checkpoint.every=0"), place / "run")
    said = capsys.readouterr().out
    assert "curves.png (No space left on device): python -m rlhf.report draws it again" in said
    assert json.loads((place / "run" / "summary.json").read_text())["status"] == "finished"
    assert not (place / "run" / "curves.png").exists()


def test_a_mistake_in_what_writes_is_none_of_the_disk_s(tmp_path):
    with pytest.raises(TypeError, match="ours"), whole(tmp_path / "policy") as folder:
        folder.mkdir()
        raise TypeError("ours")
    assert list(tmp_path.iterdir()) == []


def write(folder: Path, text: str) -> None:
    with whole(folder) as new:
        new.mkdir()
        (new / "weights").write_text(text)


@pytest.mark.parametrize("moment", [1, 2])
def test_what_was_there_is_there_whole_if_the_process_is_killed_while_it_is_replaced(tmp_path, monkeypatch, moment):
    policy = tmp_path / "policy"
    write(policy, "old")
    renames = []

    def killed(*paths):
        renames.append(paths)
        if len(renames) == moment:
            raise KeyboardInterrupt  # nothing in the block's own code runs for it, as for a kill
        rename(*paths)

    rename = os.rename
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(policy, "new")
    monkeypatch.undo()
    there = [path.parent.name for path in tmp_path.rglob("weights") if path.read_text() == "old"]
    assert there == (["policy"] if moment == 1 else [".before-policy"])
    write(policy, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"] and (policy / "weights").read_text() == "new"


def test_what_was_there_is_back_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    policy = tmp_path / "policy"
    write(policy, "old")
    rename = os.rename

    def refused(source, target):
        if source.name.startswith(".writing"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(RunError, match="policy/ cannot be written"):
        write(policy, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"] and (policy / "weights").read_text() == "old"


@pytest.mark.slow
@pytest.mark.parametrize("kib", [40, 130, 300, 560])
def test_on_disks_of_any_size_there_is_no_traceback(rlhf_train, disk, kib):
    place = disk(kib)
    dials = ("steps=4", "checkpoint.every=2", "logger=[console,jsonl,tensorboard]")
    done = rlhf_train(*SMALL, *SHORT, *dials, f"hydra.run.dir={place / 'run'}")
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.returncode == 0 or "No space left" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_of_the_file_system_a_run_opens_its_folder_and_says_so(
    compose_run, tmp_path, monkeypatch, capsys, number
):
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with ExitStack() as stack:
        assert opened(compose_run(*SMALL, *SHORT), tmp_path / "run", stack, Place()).folder == tmp_path / "run"
    assert f"warning: the file system of {tmp_path / 'run'} has no locks: " in capsys.readouterr().out

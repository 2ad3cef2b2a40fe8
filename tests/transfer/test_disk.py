import json
import os
import time

import pytest
import torch
from worker_process import Float8Model, OddModel, fingerprint

from transfer.agreement import wire
from transfer.agreement.manifest import Manifest
from transfer.backends.disk import DiskIntake, DiskPublisher
from transfer.config import DiskConfig, SenderConfig

CPU = torch.device("cpu")


def pair(tmp_path, weights, keep=2):
    """Both halves, prepared, and the folder."""
    publisher = DiskPublisher(DiskConfig(sender=SenderConfig(), keep=keep), tmp_path)
    intake = DiskIntake(publisher.endpoint)
    manifest = Manifest.of(weights)
    intake.prepare(manifest, publisher.prepare(manifest, weights), CPU)
    return publisher, intake, tmp_path / "weights"


def files(folder):
    """What lies there, but for the name of who writes."""
    return sorted(set(os.listdir(folder)) - {".writer"})


@pytest.mark.parametrize("model", [OddModel, Float8Model])
def test_every_kind_of_tensor_comes_back_byte_for_byte(model, tmp_path):
    weights = model(seed=3).state_dict()
    publisher, intake, _ = pair(tmp_path, weights)
    staged = intake.stage(0, publisher.write(0, weights, (), False)[0])
    assert fingerprint(staged) == {name: print_ for name, print_ in fingerprint(weights).items() if name in staged}
    assert set(staged) == {entry.name for entry in Manifest.of(weights).entries}


def test_weights_are_written_in_the_dtype_that_was_agreed_on(tmp_path):
    weights = {"w": torch.randn(5)}
    publisher = DiskPublisher(DiskConfig(sender=SenderConfig(), path=str(tmp_path)), tmp_path / "unused")
    manifest = Manifest.of(weights, torch.bfloat16)
    intake = DiskIntake(publisher.endpoint)
    intake.prepare(manifest, publisher.prepare(manifest, weights), CPU)
    assert torch.equal(intake.stage(0, publisher.write(0, weights, (), False)[0])["w"], weights["w"].bfloat16())


def test_only_the_newest_and_the_served_versions_stay(tmp_path):
    weights = {"w": torch.zeros(2)}
    publisher, _, folder = pair(tmp_path, weights)
    for version in range(5):
        publisher.write(version, weights, {1}, False)
    assert files(folder) == [
        f"00000000-{version:08d}.{kind}" for version in (1, 3, 4) for kind in ("json", "safetensors")
    ]


def test_only_what_was_left_half_written_long_ago_is_removed(tmp_path):
    for name, age_s in ((".writing-old", 7200), (".writing-new", 10)):
        (tmp_path / "weights" / name).mkdir(parents=True)
        (tmp_path / "weights" / name / "weights").touch()
        os.utime(tmp_path / "weights" / name, (time.time() - age_s,) * 2)
    pair(tmp_path, {"w": torch.ones(3)})
    assert files(tmp_path / "weights") == [".writing-new"]


def test_versions_of_an_earlier_run_in_the_same_folder_are_left_alone(tmp_path):
    weights = {"w": torch.zeros(2)}
    earlier, _, folder = pair(tmp_path, weights)
    earlier.write(57, weights, (), False)
    earlier.close()
    publisher, intake, _ = pair(tmp_path, weights, keep=1)
    for version in range(3):
        where = publisher.write(version, weights, (), False)[0]
        intake.stage(version, where)
    assert {name.partition(".")[0] for name in files(folder)} == {"00000000-00000057", "00000000-00000002"}


def test_a_damaged_file_is_refused(tmp_path):
    weights = {"w": torch.zeros(2)}
    publisher, intake, folder = pair(tmp_path, weights)
    where = publisher.write(0, weights, (), False)[0]
    raw = bytearray((folder / "00000000-00000000.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "00000000-00000000.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"00000000-00000000\.safetensors is damaged"):
        intake.stage(0, where)


def test_a_file_of_another_version_or_of_other_weights_is_refused(tmp_path):
    weights = {"w": torch.zeros(2)}
    publisher, intake, folder = pair(tmp_path, weights)
    where = publisher.write(0, weights, (), False)[0]
    record = json.loads((folder / "00000000-00000000.json").read_text())
    (folder / "00000000-00000000.json").write_text(json.dumps({**record, "version": 1}))
    with pytest.raises(ValueError, match="describes other weights"):
        intake.stage(0, where)
    record["manifest"]["entries"][0][2] = [3]
    (folder / "00000000-00000000.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="describes other weights"):
        intake.stage(0, where)


def test_tensors_other_than_the_manifest_says_are_refused(tmp_path):
    from safetensors.torch import save

    from transfer.backends.disk import _hash

    weights = {"w": torch.zeros(2)}
    publisher, intake, folder = pair(tmp_path, weights)
    publisher.write(0, weights, (), False)[0]
    raw = save({"w": torch.zeros(2, dtype=torch.int32)})
    (folder / "00000000-00000000.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="other tensors than its manifest says"):
        intake.stage(0, {"bytes": len(raw), "xxh3_128": _hash(raw)})


@pytest.mark.parametrize("name", ["00000000-00000000.json", "00000000-00000000.safetensors"])
def test_a_link_is_never_followed(name, tmp_path):
    weights = {"w": torch.zeros(2)}
    publisher, intake, folder = pair(tmp_path, weights)
    where = publisher.write(0, weights, (), False)[0]
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(OSError, match="symbolic link"):
        intake.stage(0, where)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path):
    weights = {"w": torch.zeros(2)}
    publisher, intake, folder = pair(tmp_path, weights)
    where = publisher.write(0, weights, (), False)[0]
    (folder / "00000000-00000000.json").unlink()
    os.mkfifo(folder / "00000000-00000000.json")
    with pytest.raises(ValueError, match="must be a regular file"):
        intake.stage(0, where)


def test_no_path_comes_from_a_message(tmp_path):
    weights = {"w": torch.zeros(2)}
    publisher, intake, _ = pair(tmp_path, weights)
    where = publisher.write(0, weights, (), False)[0]
    with pytest.raises(wire.Refused, match=r"where\.path is not known"):
        intake.stage(0, {**where, "path": "/etc/passwd"})


def test_a_write_that_fails_leaves_the_earlier_version_and_no_rest(tmp_path, monkeypatch):
    weights = {"w": torch.zeros(2)}
    publisher, intake, folder = pair(tmp_path, weights)
    where = publisher.write(0, weights, (), False)[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            publisher.write(1, weights, (), False)[0]
    assert files(folder) == ["00000000-00000000.json", "00000000-00000000.safetensors"]
    assert torch.equal(intake.stage(0, where)["w"], weights["w"])

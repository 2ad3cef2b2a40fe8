"""What vLLM wants to see of a model whose weights will be sent: a folder with its config and an empty tokenizer.

The folder's path is made from its content, as vLLM compiles anew for every path that it has not seen: under
$XDG_CACHE_HOME or ~/.cache, readable by this user alone, written aside and renamed, and used only if it holds what was
to be written. Where that cannot be, it is a temporary one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf.rollout.spec import WorkerSpec

CACHE = "rlhf/vllm-models"  # below the user's cache


@contextmanager
def model_folder(spec: WorkerSpec) -> Iterator[str]:
    """The folder of a spec's model, at the same path for the same content if there is a cache to keep it in."""
    with tempfile.TemporaryDirectory(prefix="vllm-") as own:
        write_model(spec, Path(own))
        try:
            kept = _kept(Path(own), cache())
        except OSError:
            kept = None
        yield own if kept is None else str(kept)


def cache() -> Path:
    """Where folders are kept; OSError where this user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if base.startswith("/") else Path.home() / ".cache") / CACHE
    except RuntimeError as error:
        raise OSError(str(error)) from None


def write_model(spec: WorkerSpec, folder: Path) -> None:
    """Write the model's config, a tokenizer, and the model's own code if that is trusted."""
    (folder / "config.json").write_text(
        json.dumps({**spec.architecture, "architectures": [class_of(spec)]}), encoding="utf-8"
    )
    _empty_tokenizer().save_pretrained(folder)
    for path in Path(spec.code).glob("*.py") if spec.code else ():  # of the hub's the config names the repository
        shutil.copyfile(path, folder / path.name)


def class_of(spec: WorkerSpec) -> str:
    """The name of transformers' causal LM of this architecture, or of a checkpoint's own, which vLLM goes by."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = spec.architecture["architectures"][0] if spec.code else None
    return str(own or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[spec.architecture["model_type"]])


def _kept(written: Path, base: Path) -> Path | None:
    """The folder with the content of `written` in the cache; None where something else stands in its place."""
    digest = _digest(written)
    place = base / digest
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not place.exists():
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=base))  # of mode 0700
        try:
            shutil.copytree(written, aside, dirs_exist_ok=True, copy_function=shutil.copyfile)
            aside.chmod(0o700)  # which copytree takes from the folder that it copies
            with suppress(OSError):  # another worker was faster
                aside.rename(place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    ours = place.stat().st_uid == os.geteuid() and not place.is_symlink()
    return place if ours and _digest(place) == digest else None


def _digest(folder: Path) -> str:
    """Of the names and the bytes of its files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


def _empty_tokenizer() -> Any:
    """A tokenizer that nobody asks: token ids go in and out, but vLLM (0.32) does not start without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    nothing = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=nothing, unk_token="<unk>")

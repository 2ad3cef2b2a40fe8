"""Where a run has its policy as files: what is below an adapter, checkpoints, and what it leaves in the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.assembly.site import Site
from rlhf.checkpoint.whole import whole
from rlhf.config import HfModelConfig, RunConfig
from rlhf.models.adapter import add_adapter, base_digest, load_adapter, save_adapter
from rlhf.models.merging import merged
from rlhf.models.saving import brought_by, export_model, save_model
from rlhf.shell.ending import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY = "policy"  # of a run, or of a checkpoint
BASE = "base"  # folder of a run: the policy below its adapter, after the warm-up


def base_of(config: RunConfig, folder: Path) -> str | None:
    """From where workers load what the adapter builds on: the checkpoint, unless the warm-up changes it; else None."""
    if not config.model.lora.rank:
        return None
    if not (isinstance(config.model, HfModelConfig) and config.sft.steps == 0):
        return str(folder.resolve() / BASE)
    path = Path(config.model.path).expanduser()
    return str(path.resolve()) if path.is_dir() else config.model.path


def put_adapter_on(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, site: Site, base: str) -> str:
    """Write the base where it is not yet, and let an adapter learn from now on; the base's digest."""
    if base == str(site.folder.resolve() / BASE) and site.saved is None and site.ranks.first:
        with whole(Path(base)) as writing:
            save_model(policy, tokenizer, writing)
    lora = site.config.model.lora
    add_adapter(policy, lora.rank, lora.alpha, lora.target, site.config.seed)
    digest = base_digest(policy, policy.dtype)
    if site.saved is not None:
        if site.saved.told["notes"]["base"] != digest:
            raise RunError(f"the weights of {base} are not those below the checkpoint's adapter: they have changed")
        load_adapter(policy, site.saved.path / "adapter")
    return digest


def write_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str | None, folder: Path) -> None:
    """What a checkpoint holds of the policy: `policy/`, or `adapter/`, since the base stays as it is."""
    if base is None:
        save_model(policy, tokenizer, folder / "policy")
    else:
        save_adapter(policy, folder / "adapter", base)


def save_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, site: Site) -> None:
    """`policy/`, a plain Hugging Face folder; of one with an adapter, merged, and beside it the adapter alone."""
    base, dtype = base_of(site.config, site.folder), site.config.model.save_dtype
    if dtype is None and brought_by(tokenizer) is None:
        dtype = site.config.model.dtype  # also where what is trained are fp32 shards
    with whole(site.folder / POLICY) as folder:
        export_model(policy if base is None else merged(policy), tokenizer, folder, dtype)
    if base is not None:
        with whole(site.folder / "adapter") as folder:
            save_adapter(policy, folder, base)

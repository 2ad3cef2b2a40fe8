"""The policy before RL: warmed up by SFT, or with the weights that a run goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.assembly.layout import follow, lay_out, will_be_sharded
from rlhf.assembly.matter import Matter
from rlhf.assembly.policy_files import BASE, POLICY
from rlhf.assembly.site import Site
from rlhf.checkpoint.keeper import Saved
from rlhf.checkpoint.state import load_module
from rlhf.learning.microbatched import MicroBatched
from rlhf.learning.spread import Whole
from rlhf.models.policy import reload
from rlhf.stages.sft import sft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def warm_up(site: Site, matter: Matter, base: str | None) -> None:
    """Train the policy, or overwrite its weights; of one with an adapter, those below it, which come from `base`."""
    config, policy = site.config, matter.policy
    if site.saved is not None:
        if base is None and (site.saved.path / POLICY).is_dir():
            reload(policy, site.saved.path / POLICY)
        elif base is None:
            _reload_rows(policy, site.saved)
        elif base == str(site.folder.resolve() / BASE):
            reload(policy, Path(base))
        return
    if config.sft.steps:
        site.ranks.told(None)  # others wait here until the first is there, and not in a collective of a GPU
        _train(site, matter)


def _train(site: Site, matter: Matter) -> None:
    """By SFT; what will be sharded is so now, with its copies, which nobody could make of shards afterwards."""
    config, policy, dtype = site.config, matter.policy, matter.policy.dtype
    sharded = will_be_sharded(site)
    if sharded:
        lay_out(site, matter)
    by = MicroBatched(config.optim, config.microbatch_tokens, matter.spread if sharded else Whole(site.ranks))
    stage = site.bars.stage("SFT", config.sft.steps)
    for numbers in sft(policy, matter.tokenizer, matter.task.demonstrations, config.sft, by, config.seed):
        stage.advance(numbers)
    if sharded:
        follow(matter, dtype)


def _reload_rows(policy: PreTrainedModel, saved: Saved) -> None:
    """The same from what ranks have written of it, each its rows."""
    try:
        load_module(policy, saved.path, POLICY)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{saved.path} holds another model than model names: {error}") from error

"""The policy before RL: warmed up by SFT, or with the weights that a run goes on with."""

from __future__ import annotations

from pathlib import Path

from rlhf.assembly.matter import Matter
from rlhf.assembly.policy_files import BASE
from rlhf.assembly.site import Site
from rlhf.models.policy import reload
from rlhf.stages.sft import sft


def warm_up(site: Site, matter: Matter, base: str | None) -> None:
    """Train the policy, or overwrite its weights; of one with an adapter, those below it, which come from `base`."""
    config, policy = site.config, matter.policy
    if site.saved is not None:
        if base is None:
            reload(policy, site.saved.path / "policy")
        elif base == str(site.folder.resolve() / BASE):
            reload(policy, Path(base))
        return
    if config.sft.steps:
        stage = site.bars.stage("SFT", config.sft.steps)
        for numbers in sft(policy, matter.tokenizer, matter.task.demonstrations, config.sft, config.optim, config.seed):
            stage.advance(numbers)

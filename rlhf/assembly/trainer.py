"""What trains the policy, by algorithm: RL with its reference, critic and way through the model, or DPO on pairs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rlhf.assembly.matter import Matter
from rlhf.assembly.policy_files import save_policy
from rlhf.assembly.site import Site
from rlhf.checkpoint.state import random_state, restore_random
from rlhf.config import VllmRolloutConfig
from rlhf.config.algo import AlgoConfig, DpoConfig
from rlhf.learning.fitting import fits, fitting_tokens
from rlhf.learning.learner import Learner
from rlhf.learning.pass_choice import announce
from rlhf.loop import Parts, train
from rlhf.models.saving import help_export
from rlhf.stages.dpo import DpoLearner, as_json, from_json, preference_pairs, train_on_pairs

if TYPE_CHECKING:
    pass

TOKENS = "tokens_per_microbatch"  # a checkpoint's note


def train_policy(site: Site, matter: Matter, parts: Parts) -> None:
    """Train as the algorithm does, save what was asked for meanwhile, and write the policy."""
    _draw_alike(site)
    training = _trainer(site, matter, parts)
    gc.collect()
    gc.freeze()  # what lives as long as the run needs no further looking at: collections in a step are short
    with parts.keeper:
        training()
        if site.ranks.first:
            save_policy(matter.policy, matter.tokenizer, site)
        elif matter.spread.sharded:
            help_export(matter.policy)
    site.heart.look()  # while there are workers


def _draw_alike(site: Site) -> None:
    """Let the random generators of all ranks be where those of the first are."""
    state = site.ranks.told(random_state())
    if not site.ranks.first:
        restore_random(state)


def _trainer(site: Site, matter: Matter, parts: Parts) -> Callable[[], None]:
    match site.config.algo:
        case DpoConfig() as algo:
            return _on_pairs(site, matter, parts, algo)
        case AlgoConfig():
            return _by_rl(site, matter, parts)
    raise AssertionError(site.config.algo)


def _on_pairs(site: Site, matter: Matter, parts: Parts, algo: DpoConfig) -> Callable[[], None]:
    """DPO on the task's pairs, on sampled ones, or on those of the checkpoint that the run goes on from."""
    config = site.config
    if site.saved is None:
        with site.bars.waiting("pairs"):
            training, held_out = site.ranks.heard(
                lambda: preference_pairs(parts, config, algo),
                lambda pairs: as_json(*pairs),
                lambda told: from_json(told, parts.task),
            )
    else:
        training, held_out = from_json(site.saved.told["notes"]["pairs"], parts.task)
    site.notes["pairs"] = len(training)
    parts.keeper.notes["pairs"] = as_json(training, held_out)
    announce(matter.passes, config.microbatch_tokens, None, site.bars.say)
    pairs = training, held_out
    learner = DpoLearner(matter.policy, matter.tokenizer, pairs, config, matter.passes, matter.spread)
    return partial(train_on_pairs, parts, learner, config)


def _by_rl(site: Site, matter: Matter, parts: Parts) -> Callable[[], None]:
    """The loop, with a learner that has what its algorithm compares the policy with and judges it by."""
    config = site.config
    learner = Learner(
        matter.policy,
        reference=matter.reference,
        critic=matter.critic,
        config=config,
        passes=matter.passes,
        spread=matter.spread,
    )
    _fit(site, parts, learner)
    announce(matter.passes, config.microbatch_tokens, learner.fitting_tokens, site.bars.say)
    return partial(train, parts, learner, config)


def _fit(site: Site, parts: Parts, learner: Learner) -> None:
    """Let a GPU's memory decide how many tokens a micro-batch has; a run that goes on keeps what was measured first.

    Not where workers sleep while the policy learns: now they are awake, and hold what it will have.
    """
    rollout = site.config.rollout
    if not fits(learner) or (isinstance(rollout, VllmRolloutConfig) and rollout.sleep_level):
        return
    known = site.saved.told["notes"].get(TOKENS) if site.saved else None
    if known is None:
        with site.bars.waiting("learner"):
            known = min(site.ranks.gathered(fitting_tokens(learner)))
    learner.fitting_tokens = parts.keeper.notes[TOKENS] = known

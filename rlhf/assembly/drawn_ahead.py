"""What draws samples while the trainer learns, with those that a checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.ahead import kept
from rlhf.ahead.exact import Exact, read
from rlhf.ahead.free import Free, Seeded
from rlhf.ahead.slots import Slots
from rlhf.ahead.stream import Stream
from rlhf.assembly.matter import Matter
from rlhf.assembly.site import Site
from rlhf.checkpoint.keeper import Saved
from rlhf.config import RunConfig
from rlhf.config.rollout import Order
from rlhf.episodes.loop import conversing
from rlhf.gather import Gather
from rlhf.learning.batches import batches
from rlhf.monitor.metrics import Recorder
from rlhf.rollout.client import RolloutClient
from rlhf.types import Environment, Prompt
from transfer import Sender


@dataclass(frozen=True, slots=True)
class Outside:
    """What a run samples through, and by which weights first."""

    client: RolloutClient
    environment: Environment | None
    record: Recorder
    version: int  # live in every worker before the first step, and of the weights of a checkpoint


def drawn_ahead(site: Site, matter: Matter, outside: Outside, gather: Gather) -> Exact | Free:
    """In the order that is configured."""
    match site.config.rollout.ahead.order:
        case Order.exact:
            return _exact(site, matter, outside, gather)
        case Order.free:
            return _free(site, matter, outside, gather)


def _exact(site: Site, matter: Matter, outside: Outside, gather: Gather) -> Exact:
    config, prompts = site.config, matter.task.train
    order = list(batches(len(prompts), config.prompts_per_step, config.steps, config.seed))
    drawn = None
    if site.saved is not None:
        drawn = read(site.saved.path, prompts, outside.version - site.saved.told["version"])
    return Exact(gather, outside.record, prompts, order, drawn)


def _free(site: Site, matter: Matter, outside: Outside, gather: Gather) -> Free:
    config, prompts, ahead = site.config, matter.task.train, site.config.rollout.ahead
    client, environment = outside.client, outside.environment
    stream = Stream(prompts, config.prompts_per_step, config.seed)
    window = min(ahead.window, (ahead.most_lag(config.prompts_per_step) - ahead.lag) * stream.size)
    slots = Slots(stream.size, ahead.lag, config.steps * stream.size, window)
    if site.saved is not None:
        _go_on(site.saved, config, outside.version, slots, prompts)

    def sampler_of(sender: Sender) -> Seeded:
        return conversing(client.of(sender), environment)

    return Free(gather, outside.record, client, sampler_of, stream, slots)


def _go_on(saved: Saved, config: RunConfig, version: int, slots: Slots, prompts: Sequence[Prompt]) -> None:
    """Bring the slots to where the run goes on, perhaps with other dials, and with other numbers for versions."""
    done, later = saved.told["step"], version - saved.told["version"]
    slots.learned = slots.next = done * slots.size
    kept.read(saved.path, True, lambda said: kept.heard_slots(said, slots, prompts, later))
    slots.total = slots.learned + (config.steps - done) * slots.size
    slots.draw_anew(version, config.samples_per_prompt)

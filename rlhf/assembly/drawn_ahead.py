"""What draws samples while the trainer learns, with those that a checkpoint has."""

from __future__ import annotations

from rlhf.ahead import kept
from rlhf.ahead.exact import Exact, read
from rlhf.ahead.free import Free
from rlhf.ahead.in_turn import InTurn
from rlhf.ahead.slots import Slots
from rlhf.ahead.stream import Stream
from rlhf.assembly.matter import Matter
from rlhf.assembly.site import Site
from rlhf.config.rollout import Order
from rlhf.gather import Gather
from rlhf.learning.batches import batches
from rlhf.monitor.metrics import Recorder
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.turns import conversing


def drawn_ahead(site: Site, matter: Matter, client: RolloutClient, gather: Gather, record: Recorder) -> Exact | Free:
    """In the order that is configured."""
    match site.config.rollout.ahead.order:
        case Order.exact:
            return _exact(site, matter, gather, record)
        case Order.free:
            return _free(site, matter, client, gather, record)


def _exact(site: Site, matter: Matter, gather: Gather, record: Recorder) -> Exact:
    config, prompts = site.config, matter.task.train
    order = list(batches(len(prompts), config.prompts_per_step, config.steps, config.seed))
    return Exact(gather, record, prompts, order, read(site.saved.path, prompts) if site.saved else None)


def _free(site: Site, matter: Matter, client: RolloutClient, gather: Gather, record: Recorder) -> Free:
    config, prompts, ahead = site.config, matter.task.train, site.config.rollout.ahead
    stream = Stream(prompts, config.prompts_per_step, config.seed)
    window = min(ahead.window, (ahead.most_lag(config.prompts_per_step) - ahead.lag) * stream.size)
    slots = Slots(stream.size, ahead.lag, config.steps * stream.size, window)
    if site.saved is not None:
        slots.learned = slots.next = site.saved.told["step"] * stream.size
        kept.read(site.saved.path, lambda said: kept.heard_slots(said, slots, prompts))
    environment = None if matter.task.environment is None else InTurn(matter.task.environment)
    return Free(gather, record, client, lambda sender: conversing(client.of(sender), environment), stream, slots)

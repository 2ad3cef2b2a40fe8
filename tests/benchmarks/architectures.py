"""Which families of causal LMs a run on a checkpoint takes, by every way in which it computes them: a table.

    python -m tests.benchmarks.architectures                  all that transformers has, tiny; half a minute on a core
    python -m tests.benchmarks.architectures llama bamba      these

`right`: it agrees with the model's plain forward (rlhf/preflight/agreement.py), and then what the engine samples of
other prompts has the log-probs of that forward and of the learner; an adapter that has moved computes what the merged
weights do. `whole`: so, with a prompt computed once a row. `refused`: a run says so in one line before it trains.
`WRONG`: none of these; so is an error that is no refusal.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from rlhf.config import LoraConfig
from rlhf.learning.forward import collate
from rlhf.learning.passes import WHOLE, Padded
from rlhf.models.adapter import add_adapter
from rlhf.models.merging import merged
from rlhf.models.recompute import enable
from rlhf.preflight.agreement import agreeing_passes, check_engine
from rlhf.rollout.hf import HfEngine
from rlhf.rollout.sampling import Sampling
from rlhf.types import Completion, Prompt, Rollouts
from tests.benchmarks.tiny_families import FAMILIES, tiny

RIGHT, WHOLE_ROWS, REFUSED, WRONG, NOT_MADE = "right", "whole", "refused", "WRONG", "not made"
EXACT = 1e-4  # nats
PROMPTS = ([17, 30, 41, 52, 63, 74, 85], [19])  # of other lengths than the agreement's
SAMPLING = Sampling(n=2, max_tokens=5, temperature=1.0, stop_ids=tuple(range(5, 90, 6)))


@dataclass(slots=True)
class Row:
    """A family, and what became of it by each way; why, where it is not right."""

    family: str
    learner: str = NOT_MADE
    engine: str = NOT_MADE
    checkpointing: str = NOT_MADE
    adapter: str = NOT_MADE
    why: str = ""

    @property
    def ways(self) -> tuple[str, str, str, str]:
        """In the order of the table."""
        return self.learner, self.engine, self.checkpointing, self.adapter

    def note(self, why: str) -> None:
        """The first reason stays."""
        self.why = self.why or why


def judged(family: str) -> Row:
    """What a run makes of a tiny model of this family."""
    row = Row(family)
    try:
        model = tiny(family)
    except Exception as error:  # transformers' own: a package that is missing, a configuration that has no small form
        row.note(" ".join(f"cannot be made tiny: {error}".split())[:120])
        return row
    passes = _way(row, ("learner", "engine"), lambda: agreeing_passes(model, LoraConfig(), engine=True))
    if passes is None:
        passes = _way(row, ("learner",), lambda: agreeing_passes(model, LoraConfig(), engine=False))
        _way(row, ("engine",), lambda: check_engine(model))
    elif (gap := sampled_gap(model, passes)) > EXACT:
        row.engine = WRONG
        row.note(f"samples are {gap:.1g} nats off")
    if _way(row, ("checkpointing", "adapter"), lambda: _adapted(model, checkpointing=True)) is None:
        _way(row, ("checkpointing",), lambda: agreeing_passes(enable(copy.deepcopy(model)), LoraConfig(), engine=False))
        _way(row, ("adapter",), lambda: _adapted(model, checkpointing=False))
    return row


def _way(row: Row, names: Sequence[str], tried: Callable[[], Padded | None]) -> Padded | None:
    """Note what became of these ways; the passes that agree, if any."""
    try:
        found = tried()
        told = WHOLE_ROWS if found is WHOLE else RIGHT
    except ValueError as error:
        found, told = None, REFUSED if str(error).startswith("model.") else WRONG
        why = str(error).partition(" here: ")[2] or str(error)
    except Exception as error:
        found, told, why = None, WRONG, f"{type(error).__name__}: {error}"
    for name in names:
        setattr(row, name, told)
    if told in (REFUSED, WRONG) and len(names) == 1:
        row.note(why)
    return found


def sampled_gap(model: Any, passes: Padded) -> float:
    """How far log-probs of samples are from those of the plain forward and of the learner, in nats, at most."""
    samples = HfEngine(model).generate(PROMPTS, range(len(PROMPTS)), SAMPLING, lambda: 0)
    rows = [Completion(s.ids, s.logprobs, s.versions, s.finish_reason) for s in samples]
    prompts = [Prompt("", tuple(ids)) for ids in PROMPTS]
    batch = collate(Rollouts(prompts, rows, [""] * len(rows), [0] * len(prompts), SAMPLING.n), torch.device("cpu"))
    with torch.no_grad():
        learned_BT = passes.logprobs(model, batch, 1.0)
        gaps = [float(((learned_BT - batch.sampled_BT) * batch.mask_BT).abs().max())]
        for index, sample in enumerate(samples):
            prompt, ids = PROMPTS[index // SAMPLING.n], list(sample.ids)
            logits = (
                model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False)
                .logits[0, len(prompt) - 1 : -1]
                .float()
            )
            plain = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            gaps.append(float((plain - torch.tensor(list(sample.logprobs))).abs().max()))
    return max(gaps)


def _adapted(base: Any, checkpointing: bool) -> Padded:
    """The passes of the model with an adapter; AssertionError where the merged weights compute something else."""
    model, plain = copy.deepcopy(base), copy.deepcopy(base)
    passes = agreeing_passes(enable(model) if checkpointing else model, LoraConfig(rank=2), engine=False)
    add_adapter(model, 2, 4.0, [])
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view(parameter.shape))
        before, ours = (each(input_ids=ids, use_cache=False).logits for each in (plain, model))
        plain.load_state_dict(merged(model).state_dict())
        gap, moved = (
            float((each - ours).abs().max()) for each in (plain(input_ids=ids, use_cache=False).logits, before)
        )
    assert gap <= EXACT * max(1.0, moved), f"merged weights are {gap:.1g} off"
    assert moved > EXACT, "the adapter changes nothing"
    return passes


def table(rows: Sequence[Row]) -> str:
    """As Markdown, the most common ways together."""
    lines = ["| family | learner | engine | checkpointing | adapter | why |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join((row.family, *row.ways, row.why))} |" for row in rows)])


def main(families: Sequence[str]) -> None:
    """Print the table; exit code 1 if anything is wrong."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [judged(family) for family in families or FAMILIES]
    print(table(rows))
    counts = {way: sum(way in row.ways for row in rows) for way in (WRONG, REFUSED, NOT_MADE)}
    whole = sum({RIGHT, WHOLE_ROWS} >= set(row.ways) for row in rows)
    told = ", ".join(f"{count} {way}" for way, count in counts.items())
    print(f"\n{len(rows)} families: {whole} right by every way; with a way that is {told}")
    sys.exit(1 if counts[WRONG] else 0)


if __name__ == "__main__":
    main(sys.argv[1:])

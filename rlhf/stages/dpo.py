"""Direct preference optimisation (arXiv:2305.18290): the policy learns from preference pairs, without sampling.

The reference is the policy as it is at first; what it says of the pairs is computed once, so that no copy is kept.
Shapes: N pairs; B = 2N rows, the chosen and the rejected answer of one pair after the other; T response tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.checkpoint.state import State
from rlhf.config import RunConfig
from rlhf.config.algo import DpoConfig
from rlhf.learning.batches import batches
from rlhf.learning.forward import Batch
from rlhf.learning.gradient_sums import add_rows
from rlhf.learning.learner import MAX_SKIPPED
from rlhf.learning.losses import dpo
from rlhf.learning.optimizer import clip_gradients, make_optimizer
from rlhf.learning.pass_choice import context_of
from rlhf.learning.passes import PADDED, Passes
from rlhf.learning.schedules import scale
from rlhf.learning.spread import Whole
from rlhf.loop import Parts
from rlhf.models.adapter import sent_weights
from rlhf.models.device import device_of
from rlhf.models.stop_tokens import ended
from rlhf.monitor.flops import Row
from rlhf.shell.ending import RunError
from rlhf.stages.reward_model import pairs_from, split
from rlhf.types import TRUNCATED, Pair, Task, Tokenizer

TIE = 1e-4  # nats by which an implicit preference may be noise of floating point; half right, then
SEED_OFFSET = 700_001  # added to the run's seed where pairs are sampled and divided


def train_on_pairs(parts: Parts, learner: DpoLearner, config: RunConfig) -> None:
    """Run `config.steps` steps on pairs; the workers hold the newest version at each evaluation."""
    record, keeper, version = parts.record, parts.keeper, parts.version
    order = batches(len(learner.training.rows), config.prompts_per_step, config.steps, config.seed)
    done = keeper.begin(learner, version)
    for step, rows in islice(enumerate(order, start=1), done, None):
        if (step - 1) % config.evaluate_every == 0:
            keeper.judge(_evaluate(parts, learner, step - 1))
        parts.transfer.withdraw()  # what no evaluation has withdrawn: the first push of a run that goes on
        with keeper.changing():
            with record.time("learn"):
                learned = learner.learn(rows)
            if step % config.evaluate_every == 0 or step == config.steps:
                with record.time("transfer"):
                    version = parts.transfer.push(learner.weights())
                with record.time("verify"):
                    parts.probe(version)
            record.learned(step, learned, learner.lengths(rows))
            keeper.reached(step, version)
    keeper.judge(_evaluate(parts, learner, config.steps))


def _evaluate(parts: Parts, learner: DpoLearner, step: int) -> dict[str, float]:
    """Log held-out answers and pairs; the weights may change afterwards, as no worker serves them any more."""
    with parts.record.time("evaluate"):
        metrics = parts.measure()  # first: where ranks wait for the first one, a checkpoint can still be saved
        pairs = {f"eval/pair_{name}": value for name, value in learner.measure().items()}
        parts.transfer.withdraw()
    parts.record.evaluation(step, metrics | pairs)
    return metrics | pairs


# --- pairs ------------------------------------------------------------------------------------------------------------


def check_count(config: RunConfig, algo: DpoConfig, task: Task) -> None:
    """Raise ValueError where the task's own pairs, if it has any, are too few."""
    if task.preferences:
        _check_count(split(task.preferences, algo.held_out, config.seed + SEED_OFFSET)[0], config)


def preference_pairs(parts: Parts, config: RunConfig, algo: DpoConfig) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, from the data or sampled from the policy and judged by the gold score.

    No more training pairs than the steps can use; ValueError if they do not fill one step.
    """
    seed = config.seed + SEED_OFFSET
    pairs = list(parts.task.preferences) or _sampled(parts, config, algo, seed)
    training, held_out = split(pairs, algo.held_out, seed)
    _check_count(training, config)
    random.Random(seed).shuffle(training)
    return training[: config.steps * config.prompts_per_step], held_out


def _check_count(training: Sequence[Pair], config: RunConfig) -> None:
    """ValueError unless the training pairs fill one step."""
    if len(training) < config.prompts_per_step:
        raise ValueError(
            f"a step takes prompts_per_step={config.prompts_per_step} pairs, and there are {len(training)} to train "
            "on: lower it; or, where pairs are sampled, raise algo.prompts or samples_per_prompt, or change sft.steps "
            "so that the policy is right only sometimes"
        )


def as_json(training: Sequence[Pair], held_out: Sequence[Pair]) -> dict[str, list[list[str]]]:
    """Pairs for a checkpoint: the policy that they were sampled from is no more."""
    sides = {"training": training, "held_out": held_out}
    return {name: [[p.prompt.text, p.chosen, p.rejected] for p in pairs] for name, pairs in sides.items()}


def from_json(told: Mapping[str, Any], task: Task) -> tuple[list[Pair], list[Pair]]:
    """The inverse of `as_json`; ValueError where the task no longer has their prompts."""
    prompts = {prompt.text: prompt for prompt in task.train}
    try:
        training, held_out = (
            [Pair(prompts[text], chosen, rejected) for text, chosen, rejected in told[name]]
            for name in ("training", "held_out")
        )
    except KeyError as error:
        raise ValueError(f"the checkpoint has pairs of a prompt that the task has not: {error}") from error
    except TypeError as error:
        raise ValueError(f"the checkpoint's pairs cannot be read: {error}") from error
    return training, held_out


def _sampled(parts: Parts, config: RunConfig, algo: DpoConfig, seed: int) -> list[Pair]:
    prompts = list(parts.task.train[: algo.prompts])
    n, temperature = config.samples_per_prompt, config.rollout.temperature
    rollouts = parts.sampler.sample(prompts, n=n, temperature=temperature, seed=seed)
    parts.record.took(rollouts, parts.version)
    rows = zip(rollouts.prompts_B, rollouts.texts, rollouts.completions, strict=True)
    cut = {(prompt.text, text) for prompt, text, row in rows if row.finish_reason == TRUNCATED}  # nobody ended them
    pairs = pairs_from(rollouts, parts.task, algo.label_noise, seed)
    return [p for p in pairs if not {(p.prompt.text, p.chosen), (p.prompt.text, p.rejected)} & cut]


@dataclass(frozen=True, slots=True)
class Preference:
    """One pair as token ids; the answers with what ends them."""

    prompt: tuple[int, ...]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(slots=True)
class Preferences:
    """Tokenised pairs, and log pi_ref [N, 2] of their chosen and rejected answers."""

    rows: list[Preference]
    ref_N2: Tensor


def tokenised(pairs: Sequence[Pair], tokenizer: Tokenizer, context: int) -> list[Preference]:
    """The pairs as token ids; ValueError if any is longer than the model's `context`."""
    if not pairs:
        return []
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = (
        ended(tokenizer, prompts, texts) for texts in zip(*[(p.chosen, p.rejected) for p in pairs], strict=True)
    )
    rows = [Preference(pair.prompt.ids, *ids) for pair, *ids in zip(pairs, chosen, rejected, strict=True)]
    longest = max(row.length for row in rows)
    if longest > context:
        raise ValueError(
            f"the longest preference pair has {longest} tokens, and the model's context is {context}: leave long rows "
            "out of task.path, or take a model with a longer context (model.context)"
        )
    return rows


# --- learner ----------------------------------------------------------------------------------------------------------


def answer_logprobs(policy: PreTrainedModel, rows: Sequence[Preference], passes: Passes = PADDED) -> Tensor:
    """Sums of the answers' token log-probs [N, 2] at temperature 1, in fp32: chosen, rejected."""
    device = device_of(policy)
    answers = [answer for row in rows for answer in (row.chosen, row.rejected)]
    width = max(map(len, answers))
    lengths_B = torch.tensor([len(answer) for answer in answers], device=device)
    mask_BT = (torch.arange(width, device=device) < lengths_B[:, None]).float()
    batch = Batch(
        prompts=[row.prompt for row in rows],
        prompt_of_B=[b // 2 for b in range(len(answers))],
        ids_BT=torch.tensor([answer + [0] * (width - len(answer)) for answer in answers], device=device),
        mask_BT=mask_BT,
        sampled_BT=torch.zeros_like(mask_BT),
        truncated_B=torch.zeros_like(lengths_B, dtype=torch.bool),
        measured_B=torch.zeros_like(lengths_B, dtype=torch.bool),
    )
    logprobs_BT = passes.logprobs(policy, batch, temperature=1.0)
    return (logprobs_BT * mask_BT).sum(dim=1).view(-1, 2)


class DpoLearner:
    """Takes gradient steps on a policy, whose reference is what it is given; `pairs` to train on, and held-out ones."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: Tokenizer,
        pairs: tuple[Sequence[Pair], Sequence[Pair]],
        config: RunConfig,
        passes: Passes = PADDED,
        spread: Whole = Whole(),  # noqa: B008 - it holds nothing
    ) -> None:
        assert isinstance(config.algo, DpoConfig)
        self.passes = passes
        self.policy = policy.eval()
        self.spread = spread
        self.config = config
        self.beta = config.algo.beta
        self.optimizer = make_optimizer(policy, config.optim, config.optim.lr)
        context = context_of(policy)
        self.training, self.held_out = (self._with_reference(tokenised(each, tokenizer, context)) for each in pairs)
        self.steps = 0
        self.skipped = 0

    def weights(self) -> dict[str, Tensor]:
        """What an update carries: the policy's parameters and persistent buffers, or its adapter, not copied."""
        return sent_weights(self.policy)

    def state(self) -> State:
        """What training changes, beside the policy's weights, and what the reference says, which is no more."""
        return State(
            attributes={"steps": (self, "steps"), "skipped": (self, "skipped")},
            optimizers={"policy": (self.policy, self.optimizer)},
            tensors={"reference": {"training": self.training.ref_N2, "held_out": self.held_out.ref_N2}},
        )

    def learn(self, rows: Sequence[int]) -> dict[str, float]:
        """One optimiser step on these training pairs; means over them, by name.

        Raises RunError after three steps in a row without finite gradients.
        """
        optim = self.config.optim
        rate = optim.lr * scale(optim.schedule, self.steps, self.config.steps, optim.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        means = self._over(self.training, rows, gradients=True)
        norm = clip_gradients(self.optimizer, optim.max_grad_norm, self.spread.over_ranks)
        finite = math.isfinite(means["loss"]) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= MAX_SKIPPED:
            raise RunError(
                f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row (norm {norm}): the last "
                f"weights are untouched; lower optim.lr ({optim.lr}) or algo.beta ({self.beta})"
            )
        tokens = sum(len(self.training.rows[row].chosen) + len(self.training.rows[row].rejected) for row in rows)
        step = {"grad_norm": norm if finite else 0.0, "skipped_updates": float(not finite), "lr": rate}
        return means | step | {"tokens": float(tokens)}

    def lengths(self, rows: Sequence[int]) -> list[Row]:
        """Those of prompts and answers of these training pairs, two rows a pair."""
        pairs = [self.training.rows[row] for row in rows]
        return [Row(len(pair.prompt), len(answer)) for pair in pairs for answer in (pair.chosen, pair.rejected)]

    def measure(self) -> dict[str, float]:
        """Loss, accuracy, margin and implicit rewards of the held-out pairs; nothing if there are none."""
        with torch.no_grad():
            return self._over(self.held_out, range(len(self.held_out.rows)), gradients=False)

    def _over(self, pairs: Preferences, rows: Sequence[int], gradients: bool) -> dict[str, float]:
        """Means over the pairs, and the gradients of their mean loss; both the same for any split into parts."""
        with self.spread.whole(self.policy):
            totals = self._totals(pairs, rows, gradients)
            if gradients:
                self.spread.add_gradients([self.policy], [self.optimizer])
        return self.spread.ranks.sums(totals)

    def _totals(self, pairs: Preferences, rows: Sequence[int], gradients: bool) -> dict[str, float]:
        """Of this rank's share of the pairs."""
        totals: dict[str, float] = {}
        for part, counts in self.spread.share(list(self._parts(pairs.rows, rows))):
            logprobs_N2 = answer_logprobs(self.policy, [pairs.rows[row] for row in part], self.passes)
            ratio_N2 = logprobs_N2 - pairs.ref_N2[part]
            loss_N = dpo(ratio_N2[:, 0], ratio_N2[:, 1], self.beta)
            if gradients:
                (loss_N.sum() / len(rows) * counts).backward()
            if not counts:
                continue
            reward_N2 = self.beta * ratio_N2.detach()
            margin_N = reward_N2[:, 0] - reward_N2[:, 1]
            numbers = {
                "loss": loss_N.detach(),
                "accuracy": torch.where(margin_N.abs() < self.beta * TIE, 0.5, (margin_N > 0).float()),
                "margin": margin_N,
                "chosen": reward_N2[:, 0],
                "rejected": reward_N2[:, 1],
            }
            for name, value_N in numbers.items():
                totals[name] = totals.get(name, 0.0) + float(value_N.sum()) / len(rows)
        return totals

    @torch.no_grad()
    def _with_reference(self, rows: list[Preference]) -> Preferences:
        parts = list(self._parts(rows, sorted(range(len(rows)), key=lambda row: rows[row].length)))
        device = device_of(self.policy)
        ref_N2 = torch.zeros(len(rows), 2, device=device)
        with self.spread.whole(self.policy):
            for part, counts in self.spread.share(parts):
                said_N2 = answer_logprobs(self.policy, [rows[row] for row in part], self.passes)
                if counts:
                    ref_N2[part] = said_N2
        return Preferences(rows, add_rows(ref_N2, self.spread.ranks))

    def _parts(self, pairs: Sequence[Preference], rows: Sequence[int]) -> Iterator[list[int]]:
        """Split rows, in order, so that each part has at most `tokens_per_microbatch` tokens, or one pair."""
        part: list[int] = []
        width = 0
        for row in rows:
            longer = max(width, pairs[row].length)
            if part and 2 * longer * (len(part) + 1) > self.config.microbatch_tokens:
                yield part
                part, longer = [], pairs[row].length
            part.append(row)
            width = longer
        if part:
            yield part

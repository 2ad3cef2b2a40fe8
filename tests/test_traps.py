"""The traps that RLHF code falls into, a test each: none crashes, each has been shipped somewhere, all cost weeks.

In the order of the list that names them (off-by-one first, greedy against sampled last). What has more to say than one
test stands in the file of the part it is about.
"""

from __future__ import annotations

import copy
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import test_advantages
import test_correction
import test_learner
import test_losses
import torch
from composed import composed_run
from hydra.errors import CompactHydraException
from safetensors.torch import load_file
from test_learner import gradients, sampled

from rlhf.config import RunConfig
from rlhf.learning import advantages as adv
from rlhf.learning import losses
from rlhf.learning.forward import Batch, collate
from rlhf.learning.learner import Learner
from rlhf.models.encoding import encode, join
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.monitor.alarms import OF_STEPS, Watch
from rlhf.monitor.metrics import Recorder
from rlhf.rewards import FunctionReward, usable
from rlhf.rollout.build import architecture_of
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.hf import HfEngine
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.worker import Worker
from rlhf.run import run
from rlhf.shell.ending import RunError
from rlhf.tasks import make_task, read_task
from rlhf.types import Completion, Prompt, Rollouts, Task
from transfer import Transfer, make_transfer
from transfer.memory.digest import digest_of
from transfer.trainer.senders.direct import DirectSender

CPU = torch.device("cpu")
SMALL = ("experiment=smoke", "sft.steps=20", "task.prompts=256", "task.held_out=16")
SMOKE = (*SMALL, "prompts_per_step=4", "transfer=local", "logger=jsonl")
NO_STEP = "optim.lr=1e-30"  # a rate that changes no bit of a weight
make_learner = test_learner.make_learner


@dataclass
class World:
    """A policy, a worker that samples for it, and what a run would put around both."""

    config: RunConfig
    task: Task
    policy: Any
    worker: Any  # the worker's own model
    transfer: Transfer
    sampler: RolloutClient

    def learner(self) -> Learner:
        return Learner(self.policy, None, None, self.config)

    def sample(self, seed: int = 0, temperature: float | None = None) -> Rollouts:
        heat = self.config.rollout.temperature if temperature is None else temperature
        return self.sampler.sample(self.task.train[:8], n=4, temperature=heat, seed=seed)


@pytest.fixture
def world(compose_run, tmp_path) -> Iterator[Callable[..., World]]:
    """`world("algo=ppo", ..., worker=lambda policy: policy)`: weights are pushed once."""
    opened: list[Transfer] = []

    def made(*overrides: str, worker: Callable[[Any], Any] = lambda policy: policy) -> World:
        config = compose_run("model=micro", "task=sort", "algo.kl_coef=0", "transfer=local", *overrides)
        raw = read_task(config.task, config.seed)
        tokenizer = make_tokenizer(config.model, raw.characters(), raw.conversational)
        policy = make_policy(config.model, tokenizer, config.seed)
        opened.append(transfer := make_transfer(config.transfer, tmp_path).__enter__())
        model = worker(policy)
        senders = [DirectSender(Worker.around(model, transfer.endpoint), "worker 0")]
        transfer.open(policy.state_dict(keep_vars=True), senders)
        transfer.push(policy.state_dict())
        sampler = RolloutClient(senders, tokenizer, config.rollout)
        return World(config, make_task(raw, tokenizer), policy, model, transfer, sampler)

    yield made
    for transfer in opened:
        transfer.close()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`smoke("steps=3", ...)`: the folder of a short run, made once for all that ask for the same."""
    done: dict[tuple[str, ...], Path] = {}

    def trained(*overrides: str) -> Path:
        if overrides not in done:
            done[overrides] = tmp_path_factory.mktemp("run")
            run(composed_run(*SMOKE, *overrides), done[overrides])
        return done[overrides]

    return trained


def metrics(folder: Path) -> list[dict[str, float]]:
    """A run's numbers, but for how long things took."""
    measured = ("seconds/", "transfer/", "tokens_per_second")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]


def widened(batch: Batch, columns: int = 5) -> Batch:
    """The batch with more padding, of values that would be seen."""
    fill = {"ids_BT": 3, "mask_BT": 0.0, "sampled_BT": -9.0, "old_BT": -4.0, "ref_BT": -7.0, "values_BT": 5.0}
    there = {name: getattr(batch, name) for name in fill if getattr(batch, name) is not None}
    wide = {name: torch.nn.functional.pad(t, (0, columns), value=fill[name]) for name, t in there.items()}
    return replace(batch, **wide)


def state_digest(model: Any) -> str:
    return digest_of(model.state_dict().values())


# --- log-probs --------------------------------------------------------------------------------------------------------


def test_trap_01_the_log_prob_of_a_token_is_that_of_the_prefix_before_it_not_of_its_neighbour(make_learner):
    test_learner.test_log_probs_equal_a_brute_force_loop_over_prefixes(make_learner)


def test_trap_02_a_row_has_the_same_log_probs_alone_and_in_any_padded_batch(make_learner):
    test_learner.test_a_row_has_the_same_log_probs_alone_and_in_a_padded_batch(make_learner)
    test_learner.test_rows_in_two_length_groups_have_the_log_probs_that_they_have_alone(make_learner)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_trap_03_the_samplers_log_probs_are_those_that_training_recomputes_at_its_temperature(world, temperature):
    here = world(f"rollout.temperature={temperature}")
    batch = collate(here.sample(), CPU)
    with torch.no_grad():
        recomputed_BT = here.learner()._logprobs(here.policy, batch) * batch.mask_BT
    assert (recomputed_BT - batch.sampled_BT).abs().max() < 1e-5
    assert batch.sampled_BT.min() < -1, "some tokens were improbable, so that another temperature would be seen"


@pytest.mark.parametrize(("dial", "value"), [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1)])
def test_trap_04_no_dial_cuts_the_distribution_whose_log_probs_are_trained_on(compose_run, dial, value):
    with pytest.raises(
        (CompactHydraException, AttributeError), match=rf"rollout\.{dial}={value} cuts .* evaluate\.{dial}"
    ):
        compose_run(f"rollout.{dial}={value}")
    run = compose_run(f"evaluate.{dial}={value}")
    assert not run.rollout.cut and run.evaluate.cut(run.rollout.cut).told == {dial: value}, "of evaluations alone"


def test_trap_05_the_sampled_eos_is_trained_on_and_the_mask_comes_from_lengths_not_from_token_values(compose_run):
    tokenizer = make_tokenizer(compose_run().model, "ab", chat=False)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ended, cut, of_pads = [5, pad, eos], [eos, 4], [pad, pad, pad, pad]  # ids mean nothing to the mask
    rows = [Completion(ids, [-1.0] * len(ids), [0] * len(ids), "stop") for ids in (ended, cut, of_pads)]
    batch = collate(Rollouts([Prompt("", (3,))], rows, [""] * 3, [0], 3), CPU)
    assert batch.mask_BT.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    (answer,) = encode(tokenizer, ["ab"], end=True)
    ids_BL, mask_BL = join([((3, 4), answer)], CPU)
    assert ids_BL[0, mask_BL[0] > 0].tolist() == [*tokenizer.encode("ab"), eos], "SFT teaches to stop, too"


# --- rewards and advantages -------------------------------------------------------------------------------------------


def test_trap_06_the_reward_is_on_the_last_sampled_token_even_if_others_follow_that_nobody_sampled():
    test_advantages.test_the_reward_of_every_row_is_on_its_last_sampled_token()


def test_trap_07_tokens_that_the_policy_did_not_sample_change_no_advantage_of_those_that_it_did():
    test_advantages.test_masked_tokens_inserted_anywhere_leave_the_advantages_of_real_tokens_unchanged()


def test_trap_08_gradients_are_the_same_for_any_micro_batches_and_any_order_of_rows(make_learner):
    test_learner.test_gradients_are_the_same_for_any_split_into_micro_batches_and_any_order(make_learner, "algo=dapo")


def test_trap_09_whitening_counts_sampled_tokens_of_the_whole_batch_and_no_padding():
    test_advantages.test_whitening_has_masked_mean_zero_and_variance_one_whatever_the_padding()


@pytest.mark.parametrize("estimator", [adv.group_norm, adv.group_mean, adv.leave_one_out])
def test_trap_10_equal_rewards_are_no_signal_to_the_last_bit_and_too_many_such_groups_an_alarm(estimator, compose_run):
    assert estimator(torch.full((2, 7), 0.1)).tolist() == [[0.0] * 7] * 2
    nearly = torch.tensor([[0.1, 0.1, 0.1 + 1e-8]])  # what rounding makes of equal rewards
    assert estimator(nearly).abs().max() < 1e-1
    watch = Watch(OF_STEPS, compose_run())
    assert "no_signal" in watch({"train/zero_std": 0.95}) and watch({"train/zero_std": 0.5}) == {}


# --- aggregation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "short_over_long"),
    [("seq_mean_token_mean", 4.0), ("token_mean", 1.0), ("seq_mean_token_sum_norm", 1.0)],
)
def test_trap_11_only_the_row_mean_weighs_the_tokens_of_short_rows_more_than_those_of_long_ones(
    aggregation, short_over_long
):
    long, short = losses.row_weights(aggregation, torch.tensor([4, 1]), max_tokens=4).tolist()
    assert short / long == pytest.approx(short_over_long)


def test_trap_12_more_padding_changes_no_gradient_of_dr_grpo_whose_divisor_is_a_constant(make_learner):
    rewards: list[float | None] = [float(b % 3) for b in range(12)]
    plain, padded = make_learner("algo=dr_grpo"), make_learner("algo=dr_grpo")
    score = padded.score
    padded.score = lambda rollouts: widened(score(rollouts))  # type: ignore[method-assign]
    before, after = gradients(plain, sampled(), rewards), gradients(padded, sampled(), rewards)
    assert torch.allclose(before, after, atol=1e-7) and before.abs().max() > 1e-4
    half = gradients(make_learner("algo=dr_grpo", "algo.kl_coef=0", "rollout.max_new_tokens=32"), sampled(), rewards)
    whole = gradients(make_learner("algo=dr_grpo", "algo.kl_coef=0", "rollout.max_new_tokens=16"), sampled(), rewards)
    assert torch.allclose(2 * half, whole, atol=1e-7), "rollout.max_new_tokens is that constant"


def test_trap_13_whether_a_row_is_masked_depends_on_its_gap_a_token_not_on_its_length():
    test_correction.test_making_a_row_longer_with_an_equal_gap_a_token_leaves_the_decision_unchanged()


def test_trap_14_the_gradient_of_the_kl_in_the_loss_is_that_of_the_true_kl():
    test_losses.test_the_kl_gradient_in_the_loss_is_that_of_the_true_kl()
    test_losses.test_plain_gradients_through_k1_and_k3_are_not_that_of_the_true_kl()


# --- worker and trainer -----------------------------------------------------------------------------------------------


def test_trap_15_a_run_that_learns_nothing_keeps_the_gap_between_worker_and_trainer_constant(world, smoke):
    gaps = [row["train/mismatch"] for row in metrics(smoke("steps=4", NO_STEP)) if "train/mismatch" in row]
    assert len(gaps) == 4 and max(gaps) < 1e-6
    here = world(NO_STEP, worker=lambda policy: copy.deepcopy(policy).to(torch.bfloat16))
    before, learner, steps = state_digest(here.policy), here.learner(), []
    for seed in range(5):
        rollouts = here.sample(seed)
        steps.append(learner.learn(learner.score(rollouts), [float(len(text)) for text in rollouts.texts])["mismatch"])
    assert state_digest(here.policy) == before
    assert min(steps) > 1e-5 and max(steps) < 2 * min(steps), "what another dtype costs, step after step the same"
    assert max(steps) < 0.01


def test_trap_16_one_changed_weight_reaches_the_worker_by_checksum_and_by_the_log_probs_it_samples_with(world):
    here = world("transfer=ipc", "transfer.take=copy", worker=copy.deepcopy)

    def gap() -> float:
        batch = collate(here.sample(seed=5), CPU)
        with torch.no_grad():
            recomputed_BT = here.learner()._logprobs(here.policy, batch) * batch.mask_BT
        return float((recomputed_BT - batch.sampled_BT).abs().max())

    assert state_digest(here.worker) == state_digest(here.policy) and gap() < 1e-5
    with torch.no_grad():
        here.policy.lm_head.weight[4, 0] += 3.0
    assert state_digest(here.worker) != state_digest(here.policy) and gap() > 1e-3, "stale"
    assert here.transfer.push(here.policy.state_dict()) == 1
    assert state_digest(here.worker) == state_digest(here.policy) and gap() < 1e-5
    assert here.sample().version == 1


def test_trap_17_dropout_is_off_so_that_two_passes_over_the_same_rows_agree_bit_for_bit(compose_run):
    config = compose_run("model=micro", "updates_per_step=2")
    policy = make_policy(config.model, make_tokenizer(config.model, "abcdefghi", chat=False), seed=1).train()
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():
        noisy = [policy(torch.tensor([[5, 6, 7]])).logits for _ in range(2)]
    assert not torch.equal(*noisy), "this policy would drop"
    learner = Learner(policy, copy.deepcopy(policy).eval(), None, config)
    first, second = learner.score(sampled()), learner.score(sampled())
    assert torch.equal(first.old_BT, second.old_BT) and torch.equal(first.ref_BT, second.ref_BT)
    later = [row for row, prompt in enumerate(first.prompt_of_B) if prompt > 0]  # the first update's own pass has its
    assert later and torch.allclose(first.old_BT[later], first.ref_BT[later], atol=1e-5)  # in other batches


# --- the same again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["model.lora.rank=0", pytest.param("model.lora.rank=2", marks=pytest.mark.slow)])
def test_trap_18_the_reference_is_the_same_to_the_last_bit_in_every_checkpoint_and_after_a_resume(
    compose_run, tmp_path, adapter
):
    choice = (*SMOKE, "steps=4", "checkpoint.every=1", "checkpoint.keep=9", "optim.lr=0.01", adapter)
    run(compose_run(*choice, "steps=2"), tmp_path)
    run(compose_run(*choice), tmp_path, resume=True)
    policies, references = set(), set()
    for step in range(5):
        folder = tmp_path / "checkpoints" / f"{step:08d}"
        policy = load_file(next(folder.glob("[pa]*/*.safetensors")))  # policy/ or adapter/
        policies.add(digest_of([policy[name] for name in sorted(policy)]))
        if adapter.endswith("0"):
            reference = load_file(folder / "reference.safetensors")
            references.add(digest_of([reference[name] for name in sorted(reference)]))
            assert step or digest_of([policy[name] for name in sorted(policy)]) in references, "it is what it was"
        else:
            references.add(json.loads((folder / "state.json").read_text())["notes"]["base"])
    assert len(policies) == 5 and len(references) == 1


def test_trap_19_n_steps_a_kill_and_the_rest_give_the_numbers_of_all_steps_at_once(
    smoke, compose_run, tmp_path, monkeypatch
):
    overrides = ("steps=4", "evaluate_every=1", "checkpoint.every=2")
    step = Recorder.step

    def killed(record: Recorder, number: int, *rest: Any) -> None:
        if number == 4:
            raise KeyboardInterrupt  # after the step has changed all weights, so that none of it is saved
        step(record, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "step", killed)
        run(compose_run(*SMOKE, *overrides), tmp_path)
    assert len(metrics(tmp_path)) == 3 + 4, "what came after the checkpoint is there, and is to be done again"
    run(compose_run(*SMOKE, *overrides), tmp_path, resume=True)
    whole = smoke(*overrides)
    assert metrics(tmp_path) == metrics(whole) and len(metrics(whole)) == 4 + 5
    assert (tmp_path / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


class Lossy:
    """A tokenizer in which two tokens, 2 and 3, are read as one, "a", which is written as 2."""

    eos_token_id = 1

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join("a" if token in (2, 3) else "b" for token in row if token > 1) for row in rows]

    def encode(self, text, add_special_tokens=False):
        return [2 if letter == "a" else 4 for letter in text]


def test_trap_20_training_sees_the_tokens_that_were_sampled_not_those_that_their_text_would_be_read_as(world):
    here = world()
    sampler = RolloutClient(here.sampler._senders, Lossy(), here.config.rollout)
    rollouts = sampler.sample(here.task.train[:8], n=4, temperature=1.0, seed=0)
    batch = collate(rollouts, CPU)
    lossy = 0
    for b, text in enumerate(rollouts.texts):
        ids = batch.ids_BT[b, batch.mask_BT[b] > 0].tolist()
        assert ids == rollouts.completions[b].ids.tolist()
        lossy += Lossy().encode(text) != [token for token in ids if token > 1]
    assert lossy > 10, "most rows would be others, had they been read again"


def test_trap_21_long_rows_are_trained_on_as_often_as_they_are_sampled(compose_run, tmp_path, monkeypatch):
    generated, learned = [], []
    generate, learn = HfEngine.generate, Learner.learn

    def generating(self, prompts, seeds, sampling, turn):
        samples = generate(self, prompts, seeds, sampling, turn)
        if sampling.n > 1:  # neither an evaluation nor the probe
            generated.append(Counter(len(sample.ids) for sample in samples))
        return samples

    def learning(self, batch, rewards_B):
        learned.append(Counter(batch.mask_BT.sum(dim=1).int().tolist()))
        return learn(self, batch, rewards_B)

    monkeypatch.setattr(HfEngine, "generate", generating)
    monkeypatch.setattr(Learner, "learn", learning)
    run(compose_run(*SMOKE, "steps=3", "sft.steps=0", "rollout.max_new_tokens=12"), tmp_path / "run")
    assert learned == generated and len(learned) == 3
    assert all(max(lengths) == 12 and len(lengths) > 3 for lengths in learned), "long and short ones"


# --- rewards, metrics, records ----------------------------------------------------------------------------------------


def test_trap_22_a_reward_that_raises_is_no_reward_of_zero_its_sample_is_left_out_and_too_many_end_the_run(
    make_learner, tmp_path, monkeypatch
):
    (tmp_path / "picky.py").write_text(
        "def picky(prompts, completions, **columns):\n    return [1.0 / len(text) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = FunctionReward("picky:picky")
    answers = ["ab", "", "abcd", "a"] * 3
    rewards = reward([Prompt("", (1,))] * 12, answers)
    assert rewards == [0.5, None, 0.25, 1.0] * 3 and reward.report.errors == 3
    left_out = sampled()
    for b in (1, 5, 9):
        left_out.completions[b].ids[:] = array("i", [3]) * len(left_out.completions[b].ids)
    with_others, zero = (gradients(make_learner(), rows, list(rewards)) for rows in (sampled(), left_out))
    assert torch.allclose(with_others, zero, atol=1e-6), "whatever it was, it taught nothing"
    as_zero = gradients(make_learner(), sampled(), [r or 0.0 for r in rewards])
    assert not torch.allclose(with_others, as_zero, atol=1e-4)
    assert usable(rewards, 0.25) == rewards
    with pytest.raises(RunError, match=r"3 of 12 samples have no reward.*reward\.max_failed.*ZeroDivisionError"):
        usable(rewards, 0.2, reward.report.error)


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_trap_23_no_metric_counts_padding(make_learner, algo):
    rewards: list[float | None] = [float(b % 3) for b in range(12)]
    dials = (f"algo={algo}", "algo.critic_warmup_steps=0", "updates_per_step=2")
    plain, padded = make_learner(*dials), make_learner(*dials)
    before = plain.learn(plain.score(sampled()), rewards)
    after = padded.learn(widened(padded.score(sampled())), rewards)
    assert after == pytest.approx(before, rel=1e-4, abs=1e-6)
    assert {"kl", "entropy", "mismatch", "approx_kl", "clip_fraction", "ess"} <= set(before)


def test_trap_24_asking_for_log_probs_twice_applies_the_temperature_once():
    test_losses.test_token_logprobs_are_those_of_the_tempered_softmax_and_leave_the_logits_alone()
    logits = torch.randn(2, 3, 7)
    assert torch.equal(losses.entropy(logits, 0.6), losses.entropy(logits, 0.6))


def test_trap_25_the_number_of_threads_is_pinned_in_trainer_and_worker_and_stands_in_the_runs_record(
    compose_run, tmp_path, world
):
    policy = world().policy
    torch.set_num_threads(3)
    try:
        run(compose_run(*SMOKE, "steps=1", "sft.steps=0"), tmp_path / "run")
        assert torch.get_num_threads() == 1
        torch.set_num_threads(3)
        Worker.from_spec(WorkerSpec(architecture=architecture_of(policy), endpoint={"backend": "local"}, threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["threads"] == 1


def test_trap_26_every_evaluation_logs_greedy_and_sampled_answers_which_are_not_the_same_thing(smoke):
    rows = [row for row in metrics(smoke("steps=2", "evaluate_every=1", "sft.steps=100")) if "eval/gold" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all({"eval/gold", "eval/greedy_accuracy", "eval/pass_at_1"} <= set(row) for row in rows)
    assert any(row["eval/greedy_accuracy"] > row["eval/pass_at_1"] for row in rows)

"""The learner: its log-probs against brute force, its gradients for any split, its refusal of what is not finite."""

import copy
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.config.algo import Aggregation
from rlhf.learning.forward import Batch, collate, logprobs_and_entropy, response_logprobs
from rlhf.learning.learner import Learner
from rlhf.learning.microbatches import length_groups
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, value_model
from rlhf.types import Completion, Prompt, Rollouts

PROMPTS = [(5, 6, 7), (4,), (8, 9, 10, 11, 5)]


def sampled(seed: int = 0, n: int = 4) -> Rollouts:
    """Rows of random tokens and lengths, with log-probs that no policy gave them."""
    generator = torch.Generator().manual_seed(seed)
    completions = []
    for _ in range(len(PROMPTS) * n):
        length = int(torch.randint(1, 7, (), generator=generator))
        ids = torch.randint(0, 12, (length,), generator=generator).tolist()
        completions.append(Completion(ids, [-2.0] * length, [0] * length, "stop"))
    prompts = [Prompt("", ids) for ids in PROMPTS]
    return Rollouts(prompts, completions, [""] * len(completions), list(range(len(prompts))), n)


@pytest.fixture
def make_learner(compose_run):
    def make(*overrides: str) -> Learner:
        config = compose_run("model.layers=2", "model.hidden=32", "model.heads=2", "model.intermediate=48", *overrides)
        policy = make_policy(config.model, make_tokenizer(config.model, "abcdefghi", chat=False), seed=1)
        reference = make_policy(config.model, make_tokenizer(config.model, "abcdefghi", chat=False), seed=2)
        critic = value_model(policy, Head.token) if config.algo.name == "ppo" else None
        if critic is not None:
            torch.manual_seed(0)
            torch.nn.init.normal_(critic.score.weight, std=0.5)
        return Learner(policy, reference, critic, config)

    return make


def gradients(learner: Learner, rollouts: Rollouts, rewards: list[float | None]) -> torch.Tensor:
    """All gradients of one update, flat, as the optimisers would get them."""
    taken: list[torch.Tensor] = []

    def keep(loss_is_finite: bool) -> dict[str, float]:
        models = [learner.policy] if learner.critic is None else [learner.policy, learner.critic]
        taken.extend(p.grad.flatten() for m in models for p in m.parameters() if p.grad is not None)
        for model in models:
            model.zero_grad(set_to_none=True)
        return {}

    learner._step_optimizers = keep  # type: ignore[method-assign]
    learner.learn(learner.score(rollouts), rewards)
    return torch.cat(taken)


def test_log_probs_equal_a_brute_force_loop_over_prefixes(make_learner):
    learner, rollouts = make_learner(), sampled()
    batch = collate(rollouts, torch.device("cpu"))
    with torch.no_grad():
        ours = response_logprobs(learner.policy, batch, 0.6)
        for b, completion in enumerate(rollouts.completions):
            for t, token in enumerate(completion.ids):
                prefix = [*rollouts.prompts_B[b].ids, *completion.ids[:t]]
                logits = learner.policy(input_ids=torch.tensor([prefix])).logits[0, -1]
                assert float(ours[b, t]) == pytest.approx(float((logits / 0.6).log_softmax(0)[token]), abs=1e-5)


class Distributions(TorchDispatchMode):
    """For how many positions at once any operation makes a number for each word of the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.is_contiguous() and tensor.shape[-1:] == (self.vocabulary,):
                self.most = max(self.most, tensor.numel() // self.vocabulary)
        return made


def test_no_tensor_of_the_whole_vocabulary_for_all_positions_is_put_together(make_learner):
    policy, batch = make_learner().policy, collate(sampled(), torch.device("cpu"))
    rows, width = batch.ids_BT.shape
    with Distributions(policy.config.vocab_size) as made:
        logprobs, entropy = logprobs_and_entropy(policy, batch, 1.0, entropy_gradient=True)
        (logprobs.sum() + entropy.sum()).backward()
    assert made.most == rows * (width - 1), "the positions after the first, which come from the pass over prompts"


def test_a_row_has_the_same_log_probs_alone_and_in_a_padded_batch(make_learner):
    learner = make_learner()
    batch = collate(sampled(), torch.device("cpu"))
    with torch.no_grad():
        together = learner._over(batch, lambda rows: learner._logprobs(learner.policy, rows))
        for row in range(len(batch.prompt_of_B)):
            alone = learner._logprobs(learner.policy, batch.rows([row]))
            length = int(batch.mask_BT[row].sum())
            assert torch.allclose(alone[0, :length], together[row, :length], atol=1e-5)


CONF_ALGO = Path(__file__).parents[2] / "conf" / "algo"
ALGOS = sorted(path.stem for path in CONF_ALGO.glob("*.yaml") if "/schema/algo/base@" in path.read_text())  # of RL


MAIN = {"algo=grpo", "algo=ppo", "algo=gspo", "algo=dapo", "algo=reinforce_pp"}  # the others: as conversations, below
AGGREGATIONS = [f"algo=grpo algo.aggregation={aggregation.value}" for aggregation in Aggregation]


def by_rows(size: int) -> Callable[..., list[list[int]]]:
    """A split into parts of so many rows each, in an order that has nothing to do with theirs."""

    def parts(batch: Batch, rows: Sequence[int]) -> list[list[int]]:
        shuffled = random.Random(size).sample(list(rows), len(rows))
        return [shuffled[start : start + size] for start in range(0, len(shuffled), size)]

    return parts


EVERY = [*(f"algo={name}" for name in ALGOS), *AGGREGATIONS]
ALL = [each if each in MAIN else pytest.param(each, marks=pytest.mark.slow) for each in EVERY]


@pytest.mark.parametrize("algo", ALL)
def test_gradients_are_the_same_for_any_split_into_micro_batches_and_any_order(make_learner, algo):
    rollouts = sampled()
    rewards: list[float | None] = [float(b % 3) for b in range(len(rollouts.texts))]
    rewards[2] = None
    rows = [4 * p + j for p in (2, 0, 1) for j in reversed(range(4))]
    completions = [rollouts.completions[row] for row in rows]
    shuffled = replace(rollouts, prompts=[rollouts.prompts[p] for p in (2, 0, 1)], completions=completions)
    learner = make_learner(*algo.split())
    whole = gradients(learner, rollouts, rewards)
    assert whole.abs().max() > 1e-3
    for tokens in (1, 25):
        learner.config.tokens_per_microbatch = tokens
        split = gradients(learner, shuffled, [rewards[row] for row in rows])
        assert (split - whole).abs().max() < 2e-6 * whole.abs().max(), tokens
    learner._microbatches = by_rows(5)  # type: ignore[method-assign]
    assert (gradients(learner, rollouts, rewards) - whole).abs().max() < 2e-6 * whole.abs().max()


def test_rows_in_two_length_groups_have_the_log_probs_that_they_have_alone(make_learner):
    learner, rollouts = make_learner(), sampled(n=100)
    batch = collate(rollouts, torch.device("cpu"))
    assert len(length_groups(batch.mask_BT.sum(1).long().tolist())) == 2
    with torch.no_grad():
        together = learner._logprobs(learner.policy, batch)
        for row in range(0, 300, 13):
            length = int(batch.mask_BT[row].sum())
            alone = learner._logprobs(learner.policy, batch.rows([row]))
            assert torch.allclose(alone[0, :length], together[row, :length], atol=1e-5)


def test_a_micro_batch_has_at_most_the_configured_tokens_padding_and_prompts_included(make_learner):
    learner = make_learner("tokens_per_microbatch=30")
    batch = collate(sampled(), torch.device("cpu"))
    parts = learner._microbatches(batch, range(12))
    assert sorted(row for part in parts for row in part) == list(range(12)) and len(parts) > 1
    for part in parts:
        rows = batch.rows(part)
        assert len(rows.prompts) * max(map(len, rows.prompts)) + rows.ids_BT.numel() <= 30 or len(part) == 1


def test_a_group_without_signal_gives_no_gradient_but_that_of_the_kl(make_learner):
    learner = make_learner("algo.kl_coef=0", "algo.kl_in=loss")
    learner.reference = None
    assert gradients(learner, sampled(), [1.0] * 12).abs().max() == 0.0


def cut(rollouts: Rollouts, rows: tuple[int, ...]) -> Rollouts:
    """The same with these rows cut by the length limit."""
    completions = [replace(c, finish_reason="length") if b in rows else c for b, c in enumerate(rollouts.completions)]
    return replace(rollouts, completions=completions)


def test_rows_that_the_limit_has_cut_may_teach_nothing_and_still_count_in_their_groups_baseline(make_learner):
    rewards: list[float | None] = [float(b % 3) for b in range(12)]
    kept = gradients(make_learner(), cut(sampled(), (2, 5)), rewards)
    dropped = gradients(make_learner("algo.truncated=drop"), cut(sampled(), (2, 5)), rewards)
    assert torch.equal(kept, gradients(make_learner(), sampled(), rewards)), "by default they are rows like all others"
    assert not torch.allclose(dropped, kept)
    other = cut(sampled(), (2, 5))
    for b in (2, 5):
        other.completions[b].ids[:] = array("i", [3]) * len(other.completions[b].ids)
    assert torch.allclose(gradients(make_learner("algo.truncated=drop"), other, rewards), dropped, atol=1e-6)
    fewer = [None if b in (2, 5) else reward for b, reward in enumerate(rewards)]
    assert not torch.allclose(gradients(make_learner(), sampled(), fewer), dropped, atol=1e-6), "another baseline"


def test_long_rows_lose_a_part_of_their_reward(make_learner):
    rollouts = sampled()
    lengths = [len(completion.ids) for completion in rollouts.completions]
    shaped = make_learner("algo.overlong_buffer=4", "rollout.max_new_tokens=6", "algo.overlong_penalty=2")
    plain = make_learner("rollout.max_new_tokens=6")
    rewards = [float(b % 2) for b in range(12)]
    lost = [2.0 * max(0, length - 2) / 4 for length in lengths]
    expected = gradients(plain, rollouts, [r - loss for r, loss in zip(rewards, lost, strict=True)])
    assert torch.allclose(gradients(shaped, rollouts, list(rewards)), expected, atol=1e-6)


def test_a_correction_scales_the_loss_of_tokens_that_the_worker_found_less_likely(make_learner):
    rewards: list[float | None] = [float(b % 2) for b in range(12)]
    plain = gradients(make_learner("algo.kl_coef=0"), sampled(), rewards)
    unlikely = sampled()
    for completion in unlikely.completions:
        completion.logprobs[:] = array("f", [-50.0]) * len(completion.logprobs)
    capped = gradients(make_learner("algo.kl_coef=0", "algo.correction=tis"), unlikely, rewards)
    assert torch.allclose(capped, 2.0 * plain, rtol=1e-4, atol=1e-7), "at most correction_high"
    assert gradients(make_learner("algo.kl_coef=0", "algo.correction=icepop"), unlikely, rewards).abs().max() == 0
    assert gradients(make_learner("algo.kl_coef=0", "algo.correction=sequence"), unlikely, rewards).abs().max() == 0


def test_an_adaptive_coefficient_follows_the_kl_and_is_the_one_that_counts(make_learner):
    learner = make_learner("algo.kl_target=1e-4", "algo.kl_horizon=12")
    rewards: list[float | None] = [float(b % 2) for b in range(12)]
    first = learner.learn(learner.score(sampled()), rewards)
    second = learner.learn(learner.score(sampled()), rewards)
    assert first["kl_coef"] == pytest.approx(0.2) and second["kl_coef"] in (pytest.approx(0.16), pytest.approx(0.24))


def test_the_effective_share_of_samples_is_one_where_workers_and_trainer_agree(make_learner):
    learner, rollouts = make_learner(), sampled()
    with torch.no_grad():
        batch = learner.score(rollouts)
        batch.sampled_BT = learner._over(batch, lambda rows: learner._logprobs(learner.policy, rows))
    assert learner.learn(batch, [float(b % 2) for b in range(12)])["ess"] == pytest.approx(1.0, abs=1e-5)
    assert learner.learn(learner.score(rollouts), [float(b % 2) for b in range(12)])["ess"] < 0.99


def test_mismatch_and_effective_share_are_of_the_rows_that_have_the_workers_log_probs(make_learner):
    rewards, rows = [float(b % 2) for b in range(12)], sampled()
    some = replace(
        rows, completions=[replace(c, logprobs=None) if b % 3 else c for b, c in enumerate(rows.completions)]
    )
    learner = make_learner()
    batch, whole = learner.score(some), learner.score(rows)
    assert batch.measured_B.tolist() == [b % 3 == 0 for b in range(12)] and bool(whole.measured_B.all())
    assert bool((batch.sampled_BT[~batch.measured_B] == 0).all())
    assert batch.rows([3, 4]).measured_B.tolist() == [True, False]
    with torch.no_grad():
        old_BT = learner._over(batch, lambda part: learner._logprobs(learner.policy, part))
    delta = (old_BT - whole.sampled_BT)[batch.mask_BT * batch.measured_B[:, None] > 0]
    w = delta.exp()
    learned, all_learned = learner.learn(batch, rewards), make_learner().learn(whole, rewards)
    assert learned["mismatch"] == pytest.approx(float(delta.abs().mean()), rel=1e-5)
    assert learned["ess"] == pytest.approx(float(w.mean() ** 2 / w.square().mean()), rel=1e-5)
    assert {key for key in learned if learned[key] != all_learned[key]} == {"mismatch", "ess"}, "and nothing else"


def test_a_step_without_any_log_probs_of_the_workers_has_nothing_to_tell_of_them(make_learner):
    rows = sampled()
    none = replace(rows, completions=[replace(completion, logprobs=None) for completion in rows.completions])
    learner = make_learner()
    learned = learner.learn(learner.score(none), [float(b % 2) for b in range(12)])
    assert "mismatch" not in learned and "ess" not in learned


def test_mismatch_and_effective_share_are_of_updates_that_have_rows_with_the_workers_log_probs(make_learner):
    rollouts, rewards = sampled(), [float(b % 2) for b in range(12)]
    some = [replace(c, logprobs=None) if b >= 4 else c for b, c in enumerate(rollouts.completions)]
    one = make_learner("updates_per_step=3", "optim.lr=1e-9")
    found = one.learn(one.score(replace(rollouts, completions=some)), rewards)
    first = make_learner("updates_per_step=3", "optim.lr=1e-9")
    batch = first.score(rollouts)
    alone = first._update(replace(batch, old_BT=None, advantages_BT=batch.mask_BT), [0, 1, 2, 3])
    assert found["mismatch"] == pytest.approx(alone["mismatch"]) and found["ess"] == pytest.approx(alone["ess"])


def test_a_sample_without_a_reward_gives_no_gradient(make_learner):
    rollouts, rewards = sampled(), [1.0, 0.0, None, 1.0] * 3
    before = gradients(make_learner(), rollouts, rewards)
    changed = copy.deepcopy(rollouts)
    for b in (2, 6, 10):
        changed.completions[b].ids[:] = array("i", [3]) * len(changed.completions[b].ids)
    assert torch.allclose(gradients(make_learner(), changed, rewards), before, atol=1e-6)


def test_several_updates_a_step_take_each_prompt_once_and_measure_against_the_policy_before_all_of_them(make_learner):
    learner = make_learner("updates_per_step=3", "optim.lr=0.01")
    batch = learner.score(sampled())
    before = batch.old_BT.clone()
    taken, far = [], []
    update = learner._update

    def watched(batch: Batch, rows: list[int]) -> dict[str, float]:
        taken.append(rows)
        far.append(update(batch, rows))
        return far[-1]

    learner._update = watched  # type: ignore[method-assign]
    means = learner.learn(batch, [float(b % 2) for b in range(12)])
    assert taken == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(batch.old_BT, before)
    assert far[0]["approx_kl"] < 1e-8 < 1e-4 < far[1]["approx_kl"] and far[2]["approx_kl"] > 1e-4
    assert means["approx_kl"] == pytest.approx(sum(each["approx_kl"] for each in far) / 3) and learner.steps == 1


def test_each_step_has_the_rate_of_its_schedule_for_policy_and_critic(make_learner):
    schedule = ("optim.schedule=linear", "optim.warmup_steps=1", "steps=4", "optim.lr=0.01", "algo.critic_lr=0.1")
    learner = make_learner("algo=ppo", "algo.critic_warmup_steps=0", *schedule)
    before = copy.deepcopy(learner.weights())
    rewards: list[float | None] = [float(b % 2) for b in range(12)]
    first = learner.learn(learner.score(sampled()), rewards)["lr"]
    moved = max(float((before[name] - value).detach().abs().max()) for name, value in learner.weights().items())
    assert moved == pytest.approx(first, rel=0.01), "AdamW's first step is as long as its rate"
    rates = [first, *(learner.learn(learner.score(sampled()), rewards)["lr"] for _ in range(3))]
    assert rates == pytest.approx([0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3])
    assert learner.critic_optimizer is not None
    assert learner.critic_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 3)


def test_gradients_are_clipped_before_a_step_and_their_norm_is_told_as_it_was(make_learner):
    told, stepped = {}, {}
    for most in (1e9, 0.01):
        learner = make_learner(f"optim.max_grad_norm={most}")

        def step(most=most, learner=learner) -> None:
            gradients = [p.grad.flatten() for p in learner.policy.parameters() if p.grad is not None]
            stepped[most] = float(torch.cat(gradients).norm())

        learner.optimizer.step = step  # type: ignore[method-assign]
        told[most] = learner.learn(learner.score(sampled()), [float(b % 2) for b in range(12)])["grad_norm"]
    assert told[0.01] == told[1e9] == pytest.approx(stepped[1e9], rel=1e-5)
    assert stepped[0.01] == pytest.approx(0.01, rel=1e-3) and told[0.01] > 0.1


def test_the_kl_is_to_the_reference_that_follows_the_policy(make_learner):
    def kls(*dials: str) -> list[float]:
        learner = make_learner("optim.lr=0.01", *dials)
        return [learner.learn(learner.score(sampled()), [float(b % 2) for b in range(12)])["kl"] for _ in range(3)]

    fixed, copied, averaged = kls(), kls("algo.ref_every=2"), kls("algo.ref_decay=0.5")
    assert copied[:2] == fixed[:2] and fixed[2] > 0.01 and copied[2] == pytest.approx(0, abs=1e-9)
    assert averaged[0] == fixed[0] and 0 < averaged[1] < 0.9 * fixed[1] and 0 < averaged[2] < 0.9 * fixed[2]


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_no_pass_of_a_model_is_made_twice_and_each_computes_a_prompt_once_for_its_group(make_learner, algo, updates):
    learner = make_learner(f"algo={algo}", f"updates_per_step={updates}", "tokens_per_microbatch=100000")
    rollouts = sampled(n=8)
    lengths = [len(completion.ids) for completion in rollouts.completions]
    seen: dict[str, list[torch.Size]] = {}
    for name in ("policy", "reference", "critic"):
        if (model := getattr(learner, name)) is not None:
            count = seen.setdefault(name, [])
            model.register_forward_pre_hook(
                lambda _, args, inputs, count=count: count.append(inputs["input_ids"].shape), with_kwargs=True
            )
    learner.learn(learner.score(rollouts), [float(b % 2) for b in range(24)])

    def one_pass(prompts: range) -> list[tuple[int, int]]:
        """The prompts once, then the rows of all their samples but for the last token, which predicts none."""
        longest = max(lengths[8 * prompts.start : 8 * prompts.stop])
        return [(len(prompts), max(len(PROMPTS[p]) for p in prompts)), (8 * len(prompts), longest - 1)]

    all_of_them, by_update = range(3), [range(u * 3 // updates, (u + 1) * 3 // updates) for u in range(updates)]
    learned = [shape for prompts in by_update for shape in one_pass(prompts)]
    later = one_pass(range(1, 3)) if updates == 3 else []  # the old log-probs of all but the first update
    assert seen["policy"] == later + learned
    assert seen["reference"] == one_pass(all_of_them)
    if algo == "ppo":
        assert seen["critic"] == one_pass(all_of_them) + learned


def test_a_steps_first_update_and_its_later_ones_know_the_policy_before_the_step(make_learner):
    learner, rollouts = make_learner("updates_per_step=3", "optim.lr=1e-9"), sampled()
    with torch.no_grad():
        batch = learner.score(rollouts)
        old_BT = learner._over(batch, lambda rows: learner._logprobs(learner.policy, rows))
    assert batch.old_BT is not None
    assert torch.equal(batch.old_BT[:4], batch.sampled_BT[:4]) and torch.allclose(batch.old_BT[4:], old_BT[4:])
    learned = learner.learn(batch, [float(b % 2) for b in range(12)])
    expected = ((old_BT - batch.sampled_BT).abs() * batch.mask_BT).sum(dim=1).view(3, 4).sum(dim=1)
    tokens = batch.mask_BT.sum(dim=1).view(3, 4).sum(dim=1)
    assert learned["approx_kl"] < 1e-9 and learned["mismatch"] == pytest.approx(float((expected / tokens).mean()))


def test_three_updates_in_a_row_without_finite_gradients_stop_the_run_with_the_weights_untouched(make_learner):
    learner = make_learner("updates_per_step=3")
    before = copy.deepcopy(learner.weights())
    with pytest.raises(RuntimeError, match=r"not finite in 3 updates in a row.*optim\.lr"):
        batch = learner.score(sampled())
        assert batch.ref_BT is not None
        batch.ref_BT = batch.ref_BT * float("nan")
        learner.learn(batch, [float(b % 2) for b in range(12)])
    assert all(torch.equal(before[name], value) for name, value in learner.weights().items())


def test_only_the_critic_learns_while_it_warms_up(make_learner):
    learner = make_learner("algo=ppo", "algo.critic_warmup_steps=1")
    assert learner.critic is not None
    policy, critic = copy.deepcopy(learner.weights()), copy.deepcopy(learner.critic.state_dict())
    learner.learn(learner.score(sampled()), [float(b % 2) for b in range(12)])
    assert all(torch.equal(policy[name], value) for name, value in learner.weights().items())
    assert any(not torch.equal(critic[name], value) for name, value in learner.critic.state_dict().items())
    learner.learn(learner.score(sampled()), [float(b % 2) for b in range(12)])
    assert any(not torch.equal(policy[name], value) for name, value in learner.weights().items())


def test_a_finite_critic_does_not_hide_a_policy_whose_gradients_are_not(make_learner):
    learner = make_learner("algo=ppo", "algo.critic_warmup_steps=0")
    with torch.no_grad():
        learner.policy.lm_head.weight[0, 0] = float("nan")
    rewards = [float(b % 2) for b in range(12)]
    assert learner.learn(learner.score(sampled()), rewards)["skipped_updates"] == 1.0
    learner.learn(learner.score(sampled()), rewards)
    with pytest.raises(RuntimeError, match="not finite in 3 updates in a row"):
        learner.learn(learner.score(sampled()), rewards)


def conversations() -> Rollouts:
    """Rows of which the environment has said some tokens, one of them none at all."""
    rollouts = sampled()
    completions = [
        replace(c, sampled=[t % 3 != 1 or t + 1 == len(c.ids) for t in range(len(c.ids))]) if b % 4 else c
        for b, c in enumerate(rollouts.completions)
    ]
    return replace(rollouts, completions=completions)


def test_what_the_environment_said_is_context_and_teaches_nothing(make_learner):
    rollouts, rewards = conversations(), [float(b % 3) for b in range(12)]
    assert 20 < rollouts.tokens < sum(len(c.ids) for c in rollouts.completions)
    dials = ("algo=rloo", "algo.kl_coef=0", "rollout.temperature=1")
    ours = gradients(make_learner(*dials), rollouts, list(rewards))
    policy = make_learner(*dials).policy
    group = torch.tensor(rewards).view(3, 4)
    advantages = ((group - group.mean(1, keepdim=True)) * 4 / 3).flatten()
    loss = torch.zeros(())
    for b, row in enumerate(rollouts.completions):
        for t, token in enumerate(row.ids):
            if row.mask[t]:
                prefix = torch.tensor([[*rollouts.prompts_B[b].ids, *row.ids[:t]]])
                loss = loss - advantages[b] * policy(input_ids=prefix).logits[0, -1].log_softmax(0)[token]
    (loss / rollouts.tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert torch.allclose(ours, expected, atol=2e-6) and expected.abs().max() > 1e-3


@pytest.mark.parametrize("algo", ALGOS)
def test_gradients_of_conversations_are_the_same_for_any_split_into_micro_batches(make_learner, algo):
    rewards: list[float | None] = [float(b % 3) for b in range(12)]
    learner = make_learner(f"algo={algo}")
    whole = gradients(learner, conversations(), rewards)
    learner.config.tokens_per_microbatch = 30
    split = gradients(learner, conversations(), rewards)
    assert (split - whole).abs().max() < 2e-6 * whole.abs().max()
    assert whole.abs().max() > 1e-3

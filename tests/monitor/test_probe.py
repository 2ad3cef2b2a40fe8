"""The probe sees weights that workers do not sample with, whatever the bytes' digests say."""

import copy

import pytest
import torch

from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.monitor.probe import Probe
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.worker import Worker
from rlhf.shell.ending import RunError
from rlhf.tasks import make_task, read_task
from transfer import make_transfer
from transfer.trainer.senders.direct import DirectSender

OVERRIDES = ("model=micro", "task=sort", "transfer=local", "transfer.verify_every=2")


@pytest.fixture
def probed(compose_run, tmp_path):
    """`probed(worker's model from the policy, override...)` -> (probe, policy)."""

    def build(of=lambda policy: policy, *overrides):
        config = compose_run(*OVERRIDES, *overrides)
        raw = read_task(config.task, config.seed)
        tokenizer = make_tokenizer(config.model, raw.characters(), raw.conversational)
        policy = make_policy(config.model, tokenizer, config.seed)
        task = make_task(raw, tokenizer)
        with make_transfer(config.transfer, tmp_path) as transfer:
            sender = DirectSender(Worker.around(of(policy), transfer.endpoint), "worker 0")
            transfer.open(policy.state_dict(), [sender])
            transfer.push(policy.state_dict())
            sampler = RolloutClient([sender], tokenizer, config.rollout)
            return Probe(policy, list(task.held_out), sampler, config), policy

    return build


def stale(policy):
    """The policy one small gradient step ago."""
    old = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-2)
    return old


def test_it_comes_after_the_first_push_and_then_every_so_many(probed):
    probe, _ = probed()
    worst = [probe(version) for version in range(5)]
    assert [value is None for value in worst] == [False, True, False, True, False]
    assert all(value is None or 0 <= value < 1e-5 for value in worst)
    probe, _ = probed(lambda policy: policy, "transfer.verify_every=0")
    assert [probe(version) is None for version in range(5)] == [False, True, True, True, True]


def test_workers_that_sample_with_other_weights_end_the_run_with_the_difference(probed):
    probe, _ = probed(stale)
    with pytest.raises(RunError, match=r"version 7: the workers' log-probs differ .*more than 0\.001 \(transfer\.veri"):
        probe(7)


def test_the_tolerance_is_a_dial(probed):
    probe, _ = probed(stale, "transfer.verify_tolerance=100")
    assert probe(0) > 1e-3


def test_weights_that_change_later_are_seen_at_the_next_probe(probed):
    probe, policy = probed(copy.deepcopy)
    probe(0)
    with torch.no_grad():
        policy.get_output_embeddings().weight[0].add_(0.5)
    assert probe(1) is None
    with pytest.raises(RunError):
        probe(2)

"""The one-shot API, as a stock trainer uses it, feeds our real workers over HTTP and Ray."""

import copy

import pytest
import torch

from rlhf.config import HfRolloutConfig
from rlhf.rollout.client import RolloutClient
from rlhf.types import Prompt
from transfer import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine
from transfer.config import HttpSenderConfig, IpcConfig, RaySenderConfig

PROMPTS = [Prompt("x", (3, 4, 5)), Prompt("y", (8,))]


def other(model):
    """Another policy of the same shape."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(-1.5)
    return changed


def greedy(senders, tokenizer):
    rollouts = RolloutClient(senders, tokenizer, HfRolloutConfig(max_new_tokens=10)).sample(
        PROMPTS, n=1, temperature=0.0, seed=0
    )
    return [completion.logprobs for completion in rollouts.completions], rollouts.version


def test_a_worker_behind_http_takes_one_shot_updates_in_one_message_and_counts_them(
    launch, model, tokenizer, monkeypatch
):
    with launch(IpcConfig(sender=HttpSenderConfig())) as fleet:
        (sender,) = fleet.workers.senders()
        monkeypatch.setenv("RLHF_WORKER_TOKEN", fleet.spec.token)
        args = IPCTrainerSendWeightsArgs(mode="http", url=sender._url)
        IPCWeightTransferEngine.trainer_send_weights(model.named_parameters(), args)
        first, version = greedy([sender], tokenizer)
        assert version == 0
        IPCWeightTransferEngine.trainer_send_weights(other(model).named_parameters(), args)
        second, version = greedy([sender], tokenizer)
        assert version == 1 and second != first
        with pytest.raises(RuntimeError, match="no weight called surprise"):
            IPCWeightTransferEngine.trainer_send_weights([("surprise", torch.zeros(3))], args)
        assert greedy([sender], tokenizer) == (second, 1)
        IPCWeightTransferEngine.trainer_send_weights(model.named_parameters(), args)
        assert greedy([sender], tokenizer) == (first, 2)


@pytest.mark.slow
def test_ray_actors_take_one_shot_updates(launch, model, tokenizer):
    with launch(IpcConfig(sender=RaySenderConfig()), workers=2) as fleet:
        senders = fleet.workers.senders()
        args = IPCTrainerSendWeightsArgs(mode="ray", llm_handle=[sender._actor for sender in senders])
        IPCWeightTransferEngine.trainer_send_weights(other(model).named_parameters(), args)
        changed, version = greedy(senders, tokenizer)
        assert version == 0
        IPCWeightTransferEngine.trainer_send_weights(
            model.named_parameters(), dict(mode="ray", llm_handle=args.llm_handle)
        )
        original, version = greedy(senders, tokenizer)
        assert version == 1 and original != changed

"""A policy of random weights that talks in characters, and a client of a worker with it."""

from __future__ import annotations

import string
from contextlib import contextmanager

import torch

from rlhf.config import HfRolloutConfig, TinyModelConfig
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.rollout.client import RolloutClient, Wanted
from rlhf.rollout.worker import Worker
from transfer import make_transfer
from transfer.config import LocalConfig
from transfer.trainer.senders.direct import DirectSender

MODEL = TinyModelConfig(hidden=16, layers=1, heads=2, context=512)


def talking_tokenizer():
    return make_tokenizer(MODEL, string.printable, chat=True, tags=["tools", "tool_calls", "tool"])


def talking_policy(tokenizer):
    torch.set_num_threads(1)
    model = make_policy(MODEL, tokenizer, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform,
        model.lm_head.weight[tokenizer.eos_token_id].mul_(4)  # and sometimes at an end
    return model.eval()


@contextmanager
def client_of(policy, tokenizer, folder):
    """Of one worker in this process."""
    with make_transfer(LocalConfig(), folder) as transfer:
        senders = [DirectSender(Worker.around(policy, transfer.endpoint), "worker 0")]
        transfer.open(policy.state_dict(keep_vars=True), senders)
        transfer.push(policy.state_dict())
        config = HfRolloutConfig(max_new_tokens=12, temperature=0.7)
        shape = policy.config.get_text_config()
        wanted = Wanted(True, shape.vocab_size, shape.max_position_embeddings)
        yield RolloutClient(senders, tokenizer, config, wanted=wanted)

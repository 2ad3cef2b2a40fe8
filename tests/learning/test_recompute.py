"""Gradient checkpointing: the same gradients, with prompts shared through the cache as ever, and less memory."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from rlhf.config import TinyModelConfig
from rlhf.learning.forward import collate, response_logprobs, response_values
from rlhf.learning.microbatches import length_groups
from rlhf.models.policy import make_policy
from rlhf.models.recompute import enable, enabled, recomputing
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, scores, value_model
from rlhf.types import Completion, Prompt, Rollouts


def policy_of(**dials):
    config = TinyModelConfig(hidden=32, heads=2, intermediate=64, **dials)
    return make_policy(config, make_tokenizer(config, "abcdefghi", chat=False), seed=1)


def batch_of(prompts: int = 4, n: int = 20, longest: int = 12):
    """Prompts of several lengths, and for each so many rows that short ones are computed apart from long ones."""
    chance = random.Random(0)

    def ids(most: int) -> list[int]:
        return chance.choices(range(12), k=chance.randint(1, most))

    rows = [ids(longest) for _ in range(prompts * n)]
    asked = [Prompt("", tuple(ids(20))) for _ in range(prompts)]
    completions = [Completion(row, [-1.0] * len(row), [0] * len(row), "stop") for row in rows]
    return collate(Rollouts(asked, completions, [""] * len(rows), list(range(prompts)), n), torch.device("cpu"))


@contextmanager
def kept() -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps for the backward pass, by memory."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def passed(
    model, batch, outputs_of=lambda model, batch: response_logprobs(model, batch, 1.0)
) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """What comes out at the responses, all gradients of a random sum of them, and the bytes kept between."""
    model.zero_grad(set_to_none=True)
    with kept() as found:
        outputs = outputs_of(model, batch)
    weights = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(1)) * batch.mask_BT
    (outputs * weights).sum().backward()
    return outputs.detach(), [p.grad for p in model.parameters() if p.grad is not None], sum(found.values())


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_the_same_and_less_is_kept(architecture, attention):
    policy, batch = policy_of(architecture=architecture, attention=attention, layers=4), batch_of()
    assert len(length_groups(batch.mask_BT.sum(1).long().tolist())) == 2
    outputs, gradients, memory = passed(policy, batch)
    again, same, less = passed(enable(policy), batch)
    assert torch.allclose(outputs, again, atol=1e-6)
    assert len(gradients) == len(same) > 20
    for one, other in zip(gradients, same, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())
    assert less < memory / 3


def test_a_critic_and_a_reward_model_of_such_a_policy_recompute_too():
    policy, batch = policy_of(gradient_checkpointing=True), batch_of()
    assert enabled(policy) and enabled(copy.deepcopy(policy)) and not enabled(policy_of())
    critic, plain = (value_model(model, Head.token) for model in (policy, policy_of()))
    for model in (critic, plain):
        torch.nn.init.ones_(model.score.weight)
    (values, gradients, less), (expected, same, memory) = (
        passed(model, batch, response_values) for model in (critic, plain)
    )
    assert torch.allclose(values, expected, atol=1e-6) and less < memory / 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, same, strict=True))
    judge = value_model(policy, Head.sequence)
    torch.nn.init.ones_(judge.score.weight)
    with kept() as found:
        scores(judge, batch.ids_BT, batch.mask_BT.long()).sum().backward()
    with recomputing(judge) as active:
        assert active
    assert found and judge.base_model.layers[0].mlp.up_proj.weight.grad is not None


def test_nothing_is_recomputed_without_gradients_and_a_model_is_left_as_it_was():
    policy = policy_of(gradient_checkpointing=True)
    with torch.no_grad(), recomputing(policy) as active:
        assert not active
    with recomputing(policy) as active:
        assert active and "forward" in vars(policy.model.layers[0])
    assert "forward" not in vars(policy.model.layers[0])


def test_a_model_without_layers_to_recompute_says_so():
    with pytest.raises(ValueError, match=r"^model\.gradient_checkpointing: .* in Linear: set it to false"):
        enable(torch.nn.Linear(1, 1))  # type: ignore[arg-type]

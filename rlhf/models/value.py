"""What is made of a policy's backbone and a head of one number: reward models and critics. B rows, L positions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from rlhf.models.encoding import join, prompt_ids
from rlhf.models.loading import without_dropout
from rlhf.models.stop_tokens import ended, stop_ids_of
from rlhf.types import Prompt, Tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Head(Enum):
    """What a value model says about a sequence."""

    sequence = "sequence"  # one number for all of it: a reward model, see `scores`
    token = "token"  # one number a position: a critic


def value_model(policy: PreTrainedModel, head: Head) -> PreTrainedModel:
    """A copy of the policy's backbone under a new scalar head of zeros, which begins with no opinion."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    from rlhf.models.adapter import base_weights
    from rlhf.models.recompute import enable, enabled

    auto = AutoModelForSequenceClassification if head is Head.sequence else AutoModelForTokenClassification
    shape = without_dropout(copy.deepcopy(policy.config))
    shape.num_labels = 1
    shape.classifier_dropout = 0.0
    if shape.pad_token_id in stop_ids_of(shape):  # transformers would take the end of a text for padding behind it
        shape.pad_token_id = None
    try:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are all overwritten
            model = auto.from_config(
                shape,
                dtype=policy.dtype,
                attn_implementation=policy.config._attn_implementation,
                trust_remote_code=policy.is_remote_code(),
            )
    except ValueError as error:
        raise ValueError(
            f"transformers has no {head.value} classifier of the architecture {shape.model_type!r}, which a reward "
            "model (reward=model) or a critic (algo=ppo) needs: choose another model, or reward=verifier and algo=grpo"
        ) from error
    model.base_model.load_state_dict(base_weights(policy.base_model))
    for parameter in score_layer(model).parameters():
        torch.nn.init.zeros_(parameter)
    if enabled(policy):
        enable(model)
    return model.to(policy.device).eval()


def score_texts(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], answers: Sequence[str]
) -> torch.Tensor:
    """The model's scalar for each prompt + answer + what ends it, [B]; the tokenizer is the model's own."""
    import torch

    device = next(model.parameters()).device
    asked = prompt_ids(tokenizer, prompts)
    rows = list(zip(asked, ended(tokenizer, prompts, answers), strict=True))
    ids_BL, _ = join(rows, device)
    lengths_B = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows], device=device)
    mask_BL = (torch.arange(ids_BL.shape[1], device=device) < lengths_B[:, None]).long()
    return scores(model, ids_BL, mask_BL).float()


def scores(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A sequence classifier's number [B], float32, at each row's last real token; `ids`, `mask` [B, L], any padding."""
    import torch

    positions = torch.arange(ids.shape[1], device=ids.device)
    last = (positions * mask.to(positions.dtype)).argmax(dim=1)  # by the mask: padding may be the token EOS
    hidden = _hidden(model, ids, mask)[torch.arange(len(ids), device=ids.device), last]
    return score_layer(model)(hidden).squeeze(-1).float()


def _hidden(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    from rlhf.models.recompute import recomputing

    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    with recomputing(model):
        output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state


def score_layer(model: PreTrainedModel) -> Any:
    """The head of a reward model or a critic, from hidden states to one number."""
    return model.score if hasattr(model, "score") else model.classifier  # transformers' two names for it

"""A tiny model of each family of causal LMs that transformers has, from its own default configuration.

Numbers are made small by their names, and of lists with an entry a layer the first of each kind is kept, so that every
kind of layer occurs. What a family needs beyond that is in MORE.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 3_000_000  # parameters
SMALL = (  # the first pattern that is the whole name of a number decides
    (r"(.*_)?vocab_size|vocab_size_per_layer_input", 96),
    (r"hidden_size|d_model|n_embd|embed(ding)?_(size|dim)|word_embed_proj_dim|lru_width|dim_model|emb_dim", 32),
    (r".*intermediate_size|.*ffn_dim|d_ff|n_inner|dim_ff|ffn_hidden_size|expert_ffn_hidden_size|.*ffn_size", 48),
    (r".*num_attention_heads|n_heads?|.*num_heads|(en|de)coder_attention_heads|mamba_n_heads|n_mamba_heads", 4),
    (r".*num_key_value_heads|num_kv_heads", 2),
    (r".*head_dim|.*d_head|dim_head|attention_head_size|hidden_size_per_layer_input|.*_rank|d_rel", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len", 128),
    (r".*(num|n)(_routed|_local)?_experts|moe_num_experts", 4),
    (r".*experts_per_tok(en)?|.*top_?k|moe_k", 2),
    (r"n_group|topk_group|n_groups|mamba_n_?groups|num_expert_group|first_k_dense_replace|num_dense_layers", 1),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"sliding_window|.*window_size|window", 8),
    (r".*chunk_size", 16),
    (r".*d_state|ssm_state_size|state_size", 8),
    (r"(num_)?(en|de)coder_layers|depth", 2),
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers")

MLA = {"num_key_value_heads": 4, "num_experts_per_tok": 2}  # DeepSeek's latent attention: a key head a head
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
DECODER = {"is_decoder": True}
INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
INDEXED |= {"indexer_compress_ratio": 2}
TWICE = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), MLA),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "minicpm3", "sarvam_mla", "youtu"), MLA),
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), DECODER),
    **dict.fromkeys(("ernie", "megatron-bert", "prophetnet", "rembert", "roberta", "roberta-prelayernorm"), DECODER),
    **dict.fromkeys(("roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"), DECODER),
    "bailing_hybrid": {"num_key_value_heads": 4, "head_dim": None},
    "bamba": MAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dory": TWICE | {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_layer_end_index": 1},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": TWICE
    | {"num_kv_shared_layers": 2, "intermediate_size": 48, "activation_sparsity_pattern": [0.0] * 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": MAMBA
    | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": DECODER | {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "xmod": DECODER | {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": None,
        "attention_head_dim": None,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(family: str, **settings: Any) -> PreTrainedModel:
    """A model of this family, whose log-probs are far apart; whatever transformers raises where it cannot be."""
    kind = CONFIG_MAPPING[family]
    shape = _small(kind())
    for name, value in (MORE.get(family, {}) | settings).items():
        if isinstance(value, dict) and isinstance(shape.get(name), dict):
            shape[name] |= value
        elif value is None:
            shape.pop(name, None)
        else:
            shape[name] = value
    config = kind(**shape)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings in which a small configuration differs from this one."""
    told = vars(config)
    shape = {name: _small(value) for name, value in told.items() if isinstance(value, PreTrainedConfig)}
    for name, value in told.items():
        small = next((small for pattern, small in SMALL if re.fullmatch(pattern, name)), None)
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if small is not None and (number or name.endswith("token_id")):
            shape[name] = small  # type: ignore[assignment]
    layers = next((name for name in LAYERS if isinstance(told.get(name), int)), None)
    return shape | (_few_layers(told, layers) if layers else {})


def _few_layers(told: dict[str, Any], layers: str) -> dict[str, Any]:
    """Of layers of each kind the first, at least two."""
    lists = {n: v for n, v in told.items() if isinstance(v, (list, tuple)) and len(v) == told[layers]}
    kinds: dict[tuple[str, ...], int] = {}
    for place in range(told[layers]):
        kinds.setdefault(tuple(str(each[place]) for each in lists.values()), place)
    kept = sorted({*list(kinds.values())[:6], *([1] if len(kinds) < 2 else [])})
    return {layers: len(kept), **{name: [value[place] for place in kept] for name, value in lists.items()}}

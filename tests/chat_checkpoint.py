"""A checkpoint as chat models have them: it ends its turns with another token than its tokenizer's EOS."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["<pad>", "<eos>", "<unk>", "<bos>", "<turn>", "<user>", "<model>", "\n", *"abcdefgh? "]
IDS = {word: index for index, word in enumerate(WORDS)}
EOS, TURN = IDS["<eos>"], IDS["<turn>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<model>' }}"
    "{{ message['content'] + '<turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
)
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "eos_token_id": [EOS, TURN]}


def tokenizer_of(template: str | None = TEMPLATE, **special: str):
    """One token a character, and the tokens of turns; nothing pads unless `special` says so."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    # no special tokens, as in some checkpoints: decoding does not leave them out
    inner.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("<turn>", "<user>", "<model>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", **{"eos_token": "<eos>", **special}
    )
    tokenizer.chat_template = template
    return tokenizer


def chat_checkpoint(folder: Path, generation: dict | None = GENERATION, hidden: int = 16, **special: str) -> Path:
    """A Phi in bfloat16 that ends its turn nine times in ten, whatever was said; `hidden` numbers in two heads."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": IDS["<bos>"], "eos_token_id": EOS}
    model = PhiForCausalLM(
        PhiConfig(vocab_size=len(WORDS), max_position_embeddings=64, resid_pdrop=0.1, **sizes, **ends)
    )
    with torch.no_grad():
        model.model.final_layernorm.weight.zero_()
        model.lm_head.bias[TURN] = 5.0
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer_of(**special).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_conversations(path: Path, count: int = 40) -> Path:
    """Questions of one letter or two, answered by a letter, as messages."""
    letters = "abcdefgh"
    lines = [{"prompt": [{"role": "user", "content": f"{a}{b}?"}], "answer": b} for a in letters for b in letters]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
    return path

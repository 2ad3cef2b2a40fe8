"""What is measured: models of these shapes with random weights, a tokenizer, prompts, and what each part may take.

python -m tests.benchmarks.trl_gpu.shapes FOLDER     makes the model and the prompts of FOLDER/site.json
"""

from __future__ import annotations

import itertools
import json
import random
import string
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 4  # prompts that a run of ours keeps for evaluation
SEED = 0
SPECIAL = 300  # ids at the end of a vocabulary that belong to no text
SHORTEST, LONGEST = 192, 320  # tokens of a prompt
SLACK = 20  # by which a prompt may be longer, since words are not cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """What ours has to reach; None: no bar."""

    step_s: float | None = None
    faster: float | None = None  # than the best of TRL's steps
    sampling: float | None = None  # x the limit
    learning: float | None = None  # x the limit
    transfer_s: float | None = None
    memory: bool = False  # the trainer's peak is not above TRL's with Liger's layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model, the sizes of a step, and the seconds that each part is expected to take on an H200."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True
    prompts: int = 64
    group: int = 8
    new: int = 512
    pack: int = 32768  # tokens that the limit of learning computes at a time
    trl_rows: int = 32  # a micro-batch of TRL, the most that fits
    liger_rows: int = 64  # the same with Liger's layers
    share: float = 0.2  # of the GPU's memory, for vLLM
    fits: bool = False  # only tell what fits
    seconds: dict[str, float] = field(default_factory=dict)
    bars: Bars = Bars()

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.prompts * self.group

    @property
    def longest(self) -> int:
        """Tokens of the longest row, rounded up."""
        return -(-(LONGEST + SLACK + self.new) // 256) * 256


SHAPES: dict[str, Shape] = {
    "nano": Shape(
        **dict(layers=2, hidden=64, heads=2, kv_heads=1, intermediate=192, vocabulary=2048),
        **dict(prompts=4, group=4, new=16, pack=2048, trl_rows=8, liger_rows=8),
        seconds={"make": 20, "learning": 20, "sampling": 60, "ours": 30, "trl": 60, "trl defaults": 20},
    ),
    "qwen2.5-0.5b": Shape(
        **dict(layers=24, hidden=896, heads=14, kv_heads=2, intermediate=4864, vocabulary=151936),
        seconds={"make": 25, "learning": 45, "sampling": 80, "ours": 110, "trl": 205, "trl defaults": 75},
        bars=Bars(step_s=12.0, faster=1.5, sampling=1.25, learning=1.2, transfer_s=0.005),
    ),
    "qwen2.5-1.5b": Shape(
        **dict(layers=28, hidden=1536, heads=12, kv_heads=2, intermediate=8960, vocabulary=151936),
        **dict(trl_rows=16, liger_rows=32),
        seconds={"make": 30, "learning": 65, "sampling": 85, "ours": 140, "trl": 270, "trl defaults": 130},
        bars=Bars(faster=1.5, learning=1.15, memory=True),
    ),
    "qwen2.5-7b": Shape(
        **dict(layers=28, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocabulary=152064, tied=False),
        **dict(prompts=16, fits=True),
        seconds={"make": 60, "ours": 220},
    ),
}


@dataclass(frozen=True, slots=True)
class Site:
    """A shape's folder in the work folder."""

    folder: Path
    shape: Shape
    steps: int

    @classmethod
    def read(cls, folder: str) -> Site:
        """What the command has written for its parts."""
        told = json.loads((Path(folder) / "site.json").read_text())
        shape = Shape(**{**told["shape"], "bars": Bars(**told["shape"]["bars"])})
        return cls(Path(folder), shape, told["steps"])

    def write(self) -> bool:
        """Tell the parts; whether the same was told before, so that what is measured already still counts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "site.json", json.dumps({"shape": asdict(self.shape), "steps": self.steps})
        same = path.exists() and path.read_text() == text
        path.write_text(text)
        return same

    @property
    def model(self) -> Path:
        """A plain Hugging Face folder, with the tokenizer."""
        return self.folder / "model"

    @property
    def prompts(self) -> Path:
        """What ours is given; a few of these lines it keeps for evaluation."""
        return self.folder / "prompts.jsonl"

    @property
    def ordered(self) -> Path:
        """The prompts that ours trains on, with their ids, in its order: what TRL is given, and the limits."""
        return self.folder / "ordered.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """The lines of `ordered`."""
        return [json.loads(line) for line in self.ordered.read_text().splitlines()]

    def first_step(self) -> list[list[int]]:
        """The prompts of the first step, as token ids, each once for each of its rows."""
        prompts = [line["ids"] for line in self.lines()[: self.shape.prompts]]
        return [prompt for prompt in prompts for _ in range(self.shape.group)]


def sized(shape: Shape, prompts: int | None, group: int | None, new: int | None) -> Shape:
    """The shape with other sizes of a step, where they are given."""
    given = {"prompts": prompts, "group": group, "new": new}
    shape = replace(shape, **{key: value for key, value in given.items() if value})
    return replace(shape, trl_rows=min(shape.trl_rows, shape.rows), liger_rows=min(shape.liger_rows, shape.rows))


def make(site: Site) -> None:
    """Write the model, if it is not there, and the prompts."""
    tokenizer = make_tokenizer(site.shape.vocabulary)
    if not (site.model / "tokenizer_config.json").exists():
        make_model(site.shape, site.model)
        tokenizer.save_pretrained(site.model)
    count = site.steps * site.shape.prompts + HELD_OUT
    with site.prompts.open("w") as file:
        for prompt in texts(tokenizer, count):
            file.write(json.dumps({"prompt": prompt, "answer": "none"}) + "\n")
    with site.ordered.open("w") as file:
        for text, ids in in_our_order(site, tokenizer):
            file.write(json.dumps({"prompt": text, "ids": list(ids)}) + "\n")


def make_model(shape: Shape, folder: Path) -> None:
    """A Qwen2 of this shape in bfloat16, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=None,
        eos_token_id=shape.vocabulary - SPECIAL,
        pad_token_id=shape.vocabulary - SPECIAL + 1,
        use_sliding_window=False,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE like Qwen2's: bytes, pairs of them, pairs and a third, up to the size; two special tokens."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(letters)}
    merges = []
    for left, right in _pairs(letters):
        if len(words) >= vocabulary - SPECIAL:
            break
        if left + right not in words:
            words[left + right] = len(words)
            merges.append((left, right))
    special = dict(eos_token="<|endoftext|>", pad_token="<|pad|>", unk_token="<|endoftext|>")
    return Qwen2Tokenizer(vocab=words, merges=merges, **special)


def _pairs(letters: list[str]) -> Iterator[tuple[str, str]]:
    """What is merged: pairs of letters of a text come first."""
    lower = list(string.ascii_lowercase)
    first = ["Ġ", *lower]
    pairs = [(a, b) for a in first for b in lower]
    pairs += [(a, b) for a, b in itertools.product(letters, letters) if not (a in first and b in lower)]
    yield from pairs
    yield from ((a + b, c) for a, b in pairs for c in letters)


def texts(tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[str]:
    """Prompts of SHORTEST to LONGEST tokens (a few more), the same each time."""
    draw = random.Random(SEED)
    for _ in range(count):
        target, text, length = draw.randint(SHORTEST, LONGEST), "", 0
        while length < target:
            text += "".join(f" {_word(draw)}" for _ in range(max(1, (target - length) // 4)))
            length = len(tokenizer.encode(text, add_special_tokens=False))
        yield text.strip()


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 7)))


def in_our_order(site: Site, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The prompts of each step of ours, one step after the other."""
    from rlhf.config import JsonlTaskConfig
    from rlhf.learning.batches import batches
    from rlhf.tasks import make_task, read_task

    raw = read_task(JsonlTaskConfig(path=str(site.prompts), held_out=HELD_OUT), SEED)
    train = make_task(raw, tokenizer).train
    for step in batches(len(train), site.shape.prompts, site.steps, SEED):
        yield from ((train[row].text, train[row].ids) for row in step)


if __name__ == "__main__":
    make(Site.read(sys.argv[1]))

"""The data sets of reasoning-gym (arXiv:2505.24760; pip install -e ".[reasoning]"), scored by their `score_answer`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlhf.config import ReasoningGymTaskConfig
from rlhf.tasks.procedural import split
from rlhf.tasks.raw import RawTask, Row

ALL_NAMES = 'python -c "from reasoning_gym.factory import DATASETS; print(*sorted(DATASETS))"'


def reasoning_gym_task(config: ReasoningGymTaskConfig, seed: int) -> RawTask:
    """`config.prompts` different questions and `held_out` more; demonstrations are the data set's answers."""
    data = _data_set(config, seed)
    entries = list({entry["question"]: entry for entry in data}.values())
    rows = [_row(entry, index, config.chat) for index, entry in enumerate(entries)]
    return split(rows, config.held_out, "task.prompts and task.options", partial(score, data, entries))


def score(data: Any, entries: Sequence[Mapping[str, Any]], columns: Mapping[str, Any], answer: str) -> float:
    """The data set's own score of an answer; 0.0 where it cannot read it, which it says by any exception."""
    try:
        return float(data.score_answer(answer=answer.strip(), entry=entries[columns["index"]]))
    except Exception:
        return 0.0


def _row(entry: Mapping[str, Any], index: int, chat: bool) -> Row:
    question, answer = entry["question"].strip(), entry["answer"]
    asked = [{"role": "user", "content": question}] if chat else f"{question}\n"  # else nothing says where it ends
    return Row(asked, {"answer": answer, "index": index}, demonstration=answer)


def _data_set(config: ReasoningGymTaskConfig, seed: int) -> Any:
    """The data set; ValueError names what is missing or wrong."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ValueError(
            f'task=reasoning_gym needs the package reasoning-gym: pip install -e ".[reasoning]" ({error})'
        ) from None
    if config.name not in DATASETS:
        near = difflib.get_close_matches(config.name, DATASETS, n=3)
        raise ValueError(
            f"task.name must be one of reasoning-gym's {len(DATASETS)} data sets (got {config.name!r}"
            f"{'; near: ' + ', '.join(near) if near else ''}); all of them: {ALL_NAMES}"
        )
    try:
        return create_dataset(config.name, size=config.prompts + config.held_out, seed=seed, **config.options)
    except (AssertionError, TypeError, ValueError) as error:
        known = [key for key in inspect.signature(DATASETS[config.name][1]).parameters if key not in ("seed", "size")]
        raise ValueError(
            f"task.options={config.options} is refused by {config.name} ({error}); its options are {', '.join(known)}"
        ) from None

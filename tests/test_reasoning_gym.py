"""task=reasoning_gym: its data sets as prompts, its scores as gold, and one clear line for what is wrong."""

from __future__ import annotations

import json
import sys

import pytest

from rlhf.config import ReasoningGymTaskConfig, TinyModelConfig
from rlhf.models.tokenizer import make_tokenizer
from rlhf.run import run
from rlhf.tasks import make_task, read_task

DATA_SETS = {
    "chain_sum": {"max_terms": 2, "max_digits": 1},
    "spell_backward": {"max_word_len": 5},
    "leg_counting": {"max_animals": 3},
}


@pytest.fixture(scope="module", autouse=True)
def package(request):
    """The package, without which all but the test of its absence are skipped."""
    return pytest.importorskip("reasoning_gym", reason='needs reasoning-gym: pip install -e ".[reasoning]"')


def config(name: str, **dials) -> ReasoningGymTaskConfig:
    return ReasoningGymTaskConfig(
        **{"name": name, "options": DATA_SETS.get(name), "prompts": 40, "held_out": 8} | dials
    )


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_data_sets_answer_scores_one_and_another_ones_does_not(name):
    raw = read_task(config(name), seed=0)
    task = make_task(raw, make_tokenizer(TinyModelConfig(), raw.characters(), chat=False))
    prompts = [*task.train, *task.held_out]
    assert all(task.score(prompt, f" {prompt.columns['answer']} ") == 1.0 for prompt in prompts)
    scores = [task.score(prompts[0], prompt.columns["answer"]) for prompt in prompts]
    assert min(scores) < 1 and task.score(prompts[0], "") < 1
    assert not {prompt.text for prompt in task.train} & {prompt.text for prompt in task.held_out}
    assert len({prompt.text for prompt in prompts}) == len(prompts) and len(task.held_out) == 8
    assert task.demonstrations[0][1] == task.demonstrations[0][0].columns["answer"]
    assert json.dumps([prompt.columns for prompt in prompts]), "as a reward server is sent them"


def test_the_tokenizer_of_a_new_model_knows_every_character_of_questions_and_answers():
    raw = read_task(config("spell_backward"), seed=0)
    tokenizer = make_tokenizer(TinyModelConfig(), raw.characters(), chat=False)
    task = make_task(raw, tokenizer)
    known = [ids for prompt, answer in task.demonstrations for ids in (prompt.ids, tokenizer.encode(answer))]
    assert not any(tokenizer.unk_token_id in ids for ids in known)
    assert task.train[0].text.endswith("\n"), "which tells where the question ends"


def test_a_seed_gives_the_same_questions_and_another_seed_gives_others():
    first, again, other = (read_task(config("chain_sum"), seed) for seed in (0, 0, 1))
    assert [row.question for row in first.train] == [row.question for row in again.train]
    assert [row.question for row in first.train] != [row.question for row in other.train]


def test_for_a_chat_model_the_question_is_a_users_message():
    raw = read_task(config("chain_sum", chat=True), seed=0)
    assert raw.conversational
    task = make_task(raw, make_tokenizer(TinyModelConfig(), raw.characters(), chat=True))
    assert task.train[0].text.startswith("<|user|>") and task.train[0].text.endswith("=<|assistant|>")


def test_an_answer_that_the_package_cannot_read_scores_zero():
    raw = read_task(config("prime_factorization", options={"max_value": 50}), seed=0)
    assert (
        raw.gold(raw.train[0].columns, "zz") == 0.0 and raw.gold(raw.train[0].columns, raw.train[0].demonstration) == 1
    )


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"name": "chain_sun"}, r"task\.name must be one of .* \(got 'chain_sun'; near: chain_sum.*python -c"),
        ({"name": "qqqq"}, r"task\.name must be one of reasoning-gym's \d+ data sets \(got 'qqqq'\); all of them: "),
        (
            {"options": {"terms": 3}},
            r"task\.options=\{'terms': 3\} is refused .* its options are min_terms, max_terms, ",
        ),
        ({"options": {"min_terms": 0}}, r"task\.options=.* is refused by chain_sum \(min_terms must be positive\)"),
    ],
)
def test_a_mistake_is_one_line_with_what_is_allowed(dials, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_task(config(**{"name": "chain_sum", "options": {}} | dials), seed=0)
    assert "\n" not in str(raised.value)


def test_without_the_package_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ValueError, match=r'needs the package reasoning-gym: pip install -e "\.\[reasoning\]"'):
        read_task(config("chain_sum"), seed=0)


def test_a_run_is_rewarded_by_the_packages_score(compose_run, tmp_path):
    overrides = ("experiment=smoke", "task=reasoning_gym", "task.name=chain_sum", "transfer=local", "logger=jsonl")
    small = (
        "task.options={max_terms: 2, max_digits: 1}",
        "task.held_out=8",
        "steps=1",
        "sft.steps=3",
        "task.prompts=50",
    )
    run(compose_run(*overrides, *small), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["eval/gold"] <= 1 for row in rows if "eval/gold" in row) and any(
        "train/gold" in r for r in rows
    )

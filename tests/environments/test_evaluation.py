"""What an evaluation says of environments that fail."""

from types import SimpleNamespace

import pytest

from rlhf.assembly import saved_policy
from rlhf.shell.ending import RunError
from rlhf.types import FINISHED, Completion, Prompt, Rollouts, Told


def scored(monkeypatch, measured, episodes):
    rows = [Completion([5, 1], None, [3, 3], FINISHED) for _ in episodes]
    sampled = Rollouts([Prompt("?", (4,))], rows, ["a"] * len(rows), [0], len(rows), episodes)
    monkeypatch.setattr(saved_policy, "measure", lambda *given: (measured, sampled))
    task = SimpleNamespace(held_out=sampled.prompts, score=lambda prompt, text: 0.0)
    return saved_policy.scored(task, None, SimpleNamespace(evaluate=SimpleNamespace(k=[1])))


def test_rows_whose_environments_have_failed_are_counted(monkeypatch):
    measured = {"greedy_accuracy": 0.5, "gold": 0.25, "pass_at_1": 0.25}
    episodes = [Told(["a"], 0.25), Told(["a"], failed="raised", why="no"), Told(["a"], failed="raised", why="no")]
    found = scored(monkeypatch, measured, episodes)
    assert found["environment/raised"] == 2.0 and found["sampled_gold"] == 0.25


def test_an_evaluation_of_which_all_fail_says_why(monkeypatch):
    with pytest.raises(RunError, match="no score of any answer: environment died: ended with code 3"):
        scored(monkeypatch, {}, [Told([""], failed="died", why="ended with code 3")])

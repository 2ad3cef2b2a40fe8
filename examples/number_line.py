"""A game by reset and step: walk along a line of numbers until the goal is reached.

python -m rlhf.train experiment=number_line
"""

import random

STEPS = {"<": -1, ">": 1, "[": -3, "]": 3}  # what an action does
LAST = 9


class NumberLine:
    """One game; the policy is asked `2to7?` and sees where it is after each step."""

    def reset(self, start: int, goal: int) -> None:
        """Stand at the start; the prompt has said where that is."""
        self._at, self._goal = start, goal

    def step(self, action: str) -> tuple[str, float, bool]:
        """(observation, reward, whether the game is over)."""
        self._at = min(LAST, max(0, self._at + STEPS.get(action.strip(), 0)))
        there = self._at == self._goal
        return f"{self._at}", float(there), there

    @staticmethod
    def rows(count: int = 400, seed: int = 0) -> list[dict]:
        """Games of different starts and goals; a demonstration is any step."""
        draw = random.Random(seed)
        rows = []
        for _ in range(count):
            start, goal = draw.sample(range(LAST + 1), 2)
            prompt = f"{start}to{goal}?"
            rows.append({"prompt": prompt, "completion": draw.choice(list(STEPS)), "start": start, "goal": goal})
        return rows

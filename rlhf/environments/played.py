"""Episodes that are played by reset and step: an answer's text is an action, and what comes back is an observation.

step(text) returns (observation, reward, done), or Gymnasium's (observation, reward, terminated, truncated, info). The
score is the sum of the rewards, or what get_reward says.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf.environments.environment import ClassEpisode, Site
from rlhf.types import GARBAGE, Completion, Prompt, Said, Then

FORM = "step() must return (observation, reward, done), or Gymnasium's five values"


class PlayedEpisode(ClassEpisode):
    """A row's."""

    def __init__(self, site: Site, prompt: Prompt) -> None:
        super().__init__(site, prompt)
        self._sum = 0.0

    @property
    def score(self) -> float | None:
        """The rewards so far."""
        return self._sum

    def hear(self, answer: Completion, text: str, then: Then) -> None:
        """Take a step."""
        self.call("step", {str(self.site.factory.action): text}, then, self._stepped(answer, then))

    def _stepped(self, answer: Completion, then: Then) -> Any:
        def heard(value: Any) -> None:
            match value:
                case [observation, reward, bool() as done]:
                    pass
                case [observation, reward, bool() as terminated, bool() as truncated, _]:
                    done = terminated or truncated
                case _:
                    then(Said(failed=GARBAGE, why=f"{FORM} (got {value!r:.200})"))
                    return
            if isinstance(reward, bool):
                reward = float(reward)
            if not isinstance(reward, int | float) or not math.isfinite(reward):
                then(Said(failed=GARBAGE, why=f"{FORM}: its reward is no finite number (got {reward!r:.100})"))
                return
            self._sum += reward
            if not math.isfinite(self._sum):
                then(Said(failed=GARBAGE, why="the sum of the rewards of step() is no finite number"))
                return
            if done:
                self.end(then)
                return
            if not isinstance(observation, str):
                then(Said(failed=GARBAGE, why=f"{FORM}: its observation is no text (got {observation!r:.200})"))
                return
            said = [{"role": "user", "content": observation}]
            then(Said(self.site.said(observation, self.prompt, answer), observation, messages=said))

        return heard

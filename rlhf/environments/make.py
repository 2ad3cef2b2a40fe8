"""The environment of a user's class, for a tokenizer; what is wrong with the two is said before anything is trained."""

from __future__ import annotations

from rlhf.config.task import EnvironmentTaskConfig
from rlhf.environments.dialogue import Dialogue
from rlhf.environments.environment import ClassEnvironment, Site, as_tool_messages
from rlhf.environments.factory import Factory
from rlhf.environments.played import PlayedEpisode
from rlhf.environments.tools import MOST_CALLS, ToolEpisode
from rlhf.models.tool_calls import ToolFormat
from rlhf.types import Tokenizer


def environment_of(
    config: EnvironmentTaskConfig, factory: Factory, tokenizer: Tokenizer, conversational: bool
) -> ClassEnvironment:
    """ValueError where the chat template cannot be gone on with, or nobody knows how the model writes calls."""
    site = Site(config, factory, tokenizer)
    dialogue = Dialogue(tokenizer, config.template)
    if factory.plays:
        if not conversational:
            return ClassEnvironment(site, PlayedEpisode, config.reply_tokens)
        said = [{"role": "user", "content": ""}]
        _check(config, dialogue, said, called=False)
        return ClassEnvironment(site, PlayedEpisode, config.reply_tokens + len(dialogue.after(said)))
    site.tool_format, site.schemas = ToolFormat.of(tokenizer, config.tool_format), factory.schemas()
    said = as_tool_messages([""] * MOST_CALLS, [""] * MOST_CALLS)
    _check(config, dialogue, said, called=True)
    return ClassEnvironment(site, ToolEpisode, config.reply_tokens + len(dialogue.after(said, called=True)))


def _check(config: EnvironmentTaskConfig, dialogue: Dialogue, said: list[dict[str, str]], called: bool) -> None:
    dialogue.after(said, called)
    if not config.keeps_thoughts:
        dialogue.check(said, called)

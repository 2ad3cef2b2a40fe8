"""An agent that knows nothing of training: it lets a model guess a letter by hints, through OpenAI's client.

Each row of examples/letters.jsonl is a range and a secret in it. The run starts this program once a sample, with
OPENAI_BASE_URL and OPENAI_API_KEY in its environment, the row in RLHF_ROW, and where its reward goes in RLHF_SESSION.
"""

import json
import os
import urllib.request

import openai

GUESSES = 3


def play(row: dict) -> float:
    """The share of guesses that were not needed; 0 without the secret."""
    client, messages = openai.OpenAI(), list(row["prompt"])
    for used in range(GUESSES):
        said = client.chat.completions.create(model="policy", messages=messages, max_tokens=4).choices[0].message
        guess = (said.content or "").strip()
        if guess == row["answer"]:
            return 1 - used / GUESSES
        if len(guess) != 1:
            return 0.0
        hint = "<" if row["answer"] < guess else ">"
        messages += [{"role": "assistant", "content": said.content}, {"role": "user", "content": hint}]
    return 0.0


def tell(reward: float) -> None:
    """End the session."""
    request = urllib.request.Request(
        os.environ["RLHF_SESSION"] + "/reward",
        json.dumps({"reward": reward}).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    urllib.request.urlopen(request, timeout=60).close()


if __name__ == "__main__":
    tell(play(json.loads(os.environ["RLHF_ROW"])))

"""An agent that knows nothing of training: it has a model guess a letter by hints, through OpenAI's API.

Each row of examples/letters.jsonl is a range, a guess as somebody might make it, and the secret, which is always the
middle: that is to be found out. The run starts this program once a sample, with
OPENAI_BASE_URL and OPENAI_API_KEY in its environment, the row in RLHF_ROW, and where its reward goes in RLHF_SESSION.
It needs nothing but Python, as 64 of it start in a step; with the package openai, `ask` is

    openai.OpenAI().chat.completions.create(model="policy", messages=messages, max_tokens=2).choices[0].message

python -m rlhf.train experiment=agent
"""

import json
import os
import urllib.request

GUESSES = 3


def post(url: str, body: dict) -> dict:
    """What is answered to a message."""
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def ask(messages: list[dict]) -> dict:
    """The model's message."""
    body = {"model": "policy", "messages": messages, "max_tokens": 2}
    return post(f"{os.environ['OPENAI_BASE_URL']}/chat/completions", body)["choices"][0]["message"]


def play(row: dict) -> float:
    """1 if the secret is found at once, less for each hint that it took, 0 if it is not found."""
    messages = list(row["prompt"])
    for hints in range(GUESSES):
        said = ask(messages)
        guess = said["content"].strip()
        if guess == row["secret"]:
            return 1 - hints / GUESSES
        if len(guess) != 1:
            return 0.0
        hint = "<" if row["secret"] < guess else ">"
        messages += [said, {"role": "user", "content": hint}]
    return 0.0


if __name__ == "__main__":
    post(f"{os.environ['RLHF_SESSION']}/reward", {"reward": play(json.loads(os.environ["RLHF_ROW"]))})

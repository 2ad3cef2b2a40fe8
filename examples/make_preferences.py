"""Writes the example data: python examples/make_preferences.py [folder]; the same files at every run.

preferences.jsonl    a kitchen shop's help desk: a short, kind, right answer against one that is curt, rambling or wrong
answers.jsonl        which of two kitchen measures is more: questions with one right answer
conversations.jsonl  the help desk's good answers as conversations, some with a second question
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MINUTES = {
    "spaghetti": 10, "white rice": 15, "brown rice": 30, "potatoes": 20, "soft eggs": 6, "hard eggs": 10,
    "green beans": 8, "broccoli": 5, "carrots": 10, "red lentils": 15, "corn on the cob": 7, "quinoa": 15,
}  # fmt: skip
DAYS = {
    "cooked rice": 3, "fresh fish": 2, "raw chicken": 2, "cooked chicken": 4, "cut melon": 4, "open milk": 5,
    "open yogurt": 6, "soup": 4, "hard-boiled eggs": 7, "cooked beans": 4, "tofu": 4, "fresh pesto": 5,
}  # fmt: skip
INSTEAD = {
    "butter": "oil", "buttermilk": "milk with lemon juice", "honey": "maple syrup", "cream": "coconut milk",
    "shallots": "onions", "lime juice": "lemon juice", "breadcrumbs": "crushed crackers", "white wine": "broth",
    "sour cream": "plain yogurt", "cornstarch": "flour",
}  # fmt: skip
GOODS = (
    "pan", "blender", "knife set", "kettle", "toaster", "mixer", "baking tray", "scale", "grill", "teapot", "wok",
    "whisk", "juicer", "waffle iron", "rice cooker", "oven mitt", "apron", "cake tin",
)  # fmt: skip
CURT = ("no idea", "look it up", "not my problem", "whatever", "dunno", "ask someone else")
RAMBLING = (
    "well, that is a long story, my aunt always said that",
    "so many people ask this, and honestly who can say, but",
    "hmm, it depends on this and that and also on the",
)


Case = tuple[str, tuple[str, ...], str]  # a question, good answers to choose from, a wrong answer


def kitchen() -> Iterator[Case]:
    """Boiling times, keeping times, substitutes."""
    for food, minutes in MINUTES.items():
        good: tuple[str, ...] = (
            f"Boil for {minutes} minutes, then taste.",
            f"About {minutes} minutes. Enjoy your meal!",
        )
        yield f"How long do I boil {food}?", good, f"Boil for {minutes * 6} minutes."
        yield f"Boiling time for {food}, please?", good, f"Boil for {minutes * 6} minutes."
    for food, days in DAYS.items():
        good = (f"Up to {days} days in the fridge, covered.", f"In a cold fridge, {days} days.")
        late = (f"Better not: {days} days in the fridge at most.", f"Please do not: it is safe for {days} days.")
        yield f"How long can I keep {food}?", good, f"{days * 10} days on the shelf."
        yield f"Can I eat {food} after two weeks?", late, "Sure, even after a year."
    for food, other in INSTEAD.items():
        yield f"What can I use instead of {food}?", (f"Try {other}. Happy cooking!",), "Use salt, always."
        yield f"I am out of {food}. Any idea?", (f"Sure, take {other} in its place.",), "Go hungry."


def help_desk() -> Iterator[Case]:
    """What customers ask about their orders."""
    cases = {
        "My {} arrived broken. What now?": "I am sorry! We send a new {} today.",
        "Where is my {}?": "Sorry for the wait! Your {} comes in 2 days.",
        "Can I return the {}?": "Of course, within 30 days. Your label is on its way.",
        "How do I clean the {}?": "Warm water and a soft cloth suit the {}.",
        "Is the {} in stock?": "Yes, the {} is here. Shall we set one aside?",
        "Does the {} have a warranty?": "Yes, two years. Please keep the receipt.",
        "I ordered the wrong {}. Help!": "No problem, we gladly swap the {}.",
    }
    for goods in GOODS:
        for question, answer in cases.items():
            kind = answer.format(goods)
            yield question.format(goods), (kind, f"Hello! {kind}"), "We sell no such thing."


def preferences(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Every question with two different ways of getting it wrong; chosen answers vary."""
    for topic, cases in (("kitchen", kitchen()), ("help desk", help_desk())):
        for question, good, wrong in cases:
            bad = [draw.choice(CURT), draw.choice(RAMBLING), wrong]
            for rejected in draw.sample(bad, k=2):
                yield {"prompt": f"{question}\n", "chosen": draw.choice(good), "rejected": rejected, "topic": topic}


def answers() -> Iterator[dict[str, Any]]:
    """Which of two measures is more."""
    for unit in ("cups", "jars", "pots", "spoons"):
        for first, second in itertools.permutations(range(1, 10), 2):
            yield {"prompt": f"More: {first} or {second} {unit}? ", "answer": str(max(first, second)), "unit": unit}


def conversations(draw: random.Random) -> Iterator[dict[str, Any]]:
    """One or two questions, answered in the shop's tone."""
    system = {"role": "system", "content": "You are kind and brief."}
    cases = list(help_desk())
    for question, good, _ in cases:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": draw.choice(good)}]
        if draw.random() < 0.3:
            again, more, _ = draw.choice(cases)
            turns += [{"role": "user", "content": again}, {"role": "assistant", "content": draw.choice(more)}]
        yield {"messages": [system, *turns]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    print(f"{path}: {len(rows)} rows")


def main(folder: Path) -> None:
    """Write the three files."""
    draw = random.Random(0)
    for name, rows in (
        ("preferences", list(preferences(draw))),
        ("answers", list(answers())),
        ("conversations", list(conversations(draw))),
    ):
        draw.shuffle(rows)
        write(folder / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)

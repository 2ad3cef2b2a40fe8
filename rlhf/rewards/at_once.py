"""Several requests at once, in threads that no end of the run waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


def begun(ask: Callable[[Asked], Answered], asked: Sequence[Asked], concurrency: int) -> Callable[[], list[Answered]]:
    """Let `ask` begin with these, so many at a time; what is returned waits for the answers, in order.

    It raises what the first of them in this order has raised; then those that have not begun never do.
    """
    outcomes: list[tuple[bool, Any]] = [(True, None)] * len(asked)
    waiting, failed = iter(range(len(asked))), threading.Event()
    turn = threading.Lock()

    def work() -> None:
        while not failed.is_set():
            with turn:
                place = next(waiting, None)
            if place is None:
                return
            try:
                outcomes[place] = True, ask(asked[place])
            except BaseException as error:
                outcomes[place] = False, error
                failed.set()

    threads = [threading.Thread(target=work, name="reward", daemon=True) for _ in asked[:concurrency]]
    for thread in threads:
        thread.start()
    return lambda: _answers(threads, outcomes)


def _answers(threads: Sequence[threading.Thread], outcomes: Sequence[tuple[bool, Any]]) -> list[Any]:
    for thread in threads:
        thread.join()
    for good, outcome in outcomes:
        if not good:
            raise outcome
    return [outcome for _, outcome in outcomes]

"""python -m tests.fuzz --count 100000 --seed 0: hostile messages to real workers; the outcomes by verb and status."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from attack import Outcome, attack, joined

WAYS = ["arena view", "arena copy", "live copy", "live view", "disk"]


def everywhere(count: int, seed: int) -> Outcome:
    """`count` messages, shared by workers that take their weights in each way; one in twenty over HTTP."""
    each = count // len(WAYS)
    over_http = each // 20
    with ThreadPoolExecutor(2) as pool:  # the work is in the targets' processes
        jobs = [pool.submit(attack, way, seed + index, each - over_http, over_http) for index, way in enumerate(WAYS)]
        return joined([job.result() for job in jobs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = everywhere(options.count, options.seed)
    print(outcome)
    for violation in outcome.violations:
        print(violation)
    sys.exit(bool(outcome.violations))


if __name__ == "__main__":
    main()

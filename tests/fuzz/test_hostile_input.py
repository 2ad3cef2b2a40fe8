"""Mutated control messages and legacy payloads against a real worker in a process of its own, under an audit hook."""

import subprocess
import sys
from collections import Counter

import pytest
from attack import HERE, SESSION, WARM, attack
from sizes import in_ci, in_full
from traffic import VERBS

from transfer.agreement.wire import ROUTES
from transfer.engine import inert_pickle

SECONDS = 580
REFUSED = ("start_profile", "stop_profile")  # by a worker without a run's folder, as the target's is


def assert_reached(outcome):
    """The messages were no noise: every verb was met, refused, and taken; weights were replaced."""
    statuses = {verb: {status for _, v, status in outcome.table if v == verb} for verb in VERBS}
    assert all(200 in seen for verb, seen in statuses.items() if verb not in REFUSED)
    assert all(409 in statuses[verb] and 200 not in statuses[verb] for verb in REFUSED)
    assert all(422 in statuses[verb] for verb, (method, _) in ROUTES.items() if method == "POST")
    assert all({200, 409, 422} <= statuses[verb] for verb in SESSION)
    assert {f"valid {verb}" for verb in VERBS if verb not in REFUSED} <= set(outcome.done)
    assert outcome.done["flips"] > 30


def test_five_hundred_hostile_messages_of_every_verb_change_nothing_but_what_a_trainer_may_change():
    outcome = attack("arena view", seed=1, count=450, over_http=50)
    assert outcome.violations == [], "\n".join(outcome.violations)
    assert outcome.messages == 500 and {verb for _, verb, _ in outcome.table} >= set(VERBS)
    assert {200, 409, 422} <= {status for _, _, status in outcome.table} and outcome.done["flips"] > 0


@pytest.mark.slow
def test_five_thousand_hostile_messages_change_nothing_but_what_a_trainer_may_change():
    for seed in range(1, 9):  # most seeds reach everything, and each is another choice of messages
        outcome = attack("arena view", seed=seed, count=4700, over_http=300)
        assert outcome.violations == [], "\n".join(outcome.violations)
        assert outcome.messages == 5000
        if {f"valid {verb}" for verb in VERBS if verb not in REFUSED} <= set(outcome.done):
            break
    assert_reached(outcome)


@pytest.mark.parametrize("count", [in_ci(10_000), in_full(100_000)])
def test_hostile_messages_to_workers_of_every_kind_change_nothing(capsys, count):
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(count), "--seed", "0"]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=SECONDS, check=False)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"\n{count} messages, {count // 20} of them over HTTP" in done.stdout
    assert "\nviolations 0;" in done.stdout


def told(outcome):
    """All counts, but how one-shot updates were answered: a process's number plus one may be that of its thread."""
    table = Counter()
    for (_, verb, status), count in outcome.table.items():
        table[verb, status if verb != "update_weights" else None] += count
    return table, {what: count for what, count in outcome.done.items() if what.startswith("valid")}


@pytest.mark.slow
def test_a_seed_brings_back_its_messages():
    first, second = (attack("arena copy", seed=7, count=1500) for _ in range(2))
    assert first.violations == second.violations == []
    assert told(first) == told(second)


HOLES = {  # of holes.py, and what the fuzz says of each
    "a real unpickler": "pickle.find_class",
    "an unchecked message": "status 500 is not documented",
    "a memory leak": "MiB of memory",
    "a descriptor leak": "descriptors more than",
    "torn weights": "the live weights are not those of version",
    "a refusal without a reason": "409 without a reason",
    "a file named by a message": "open('/tmp/fuzz-hole",
    "a connection that a message asks for": "socket.connect",
    "strings that cannot be encoded": "the app raised UnicodeEncodeError",
    "values that are printed whole": "bytes have taken",
    "calls of which only each is bounded": "bytes have taken",
    "shapes without a bound": "status 500 is not documented",
    "incomplete one-shot weights": "the live weights are not those of version",
}


@pytest.mark.slow
@pytest.mark.parametrize("hole", HOLES)
def test_the_fuzz_sees_what_is_planted(hole):
    for seed in range(2, 12):
        outcome = attack("arena view", seed=seed, count=2 * WARM + 2000, hole=hole)
        if any(HOLES[hole] in violation for violation in outcome.violations):
            break
    else:
        raise AssertionError("ten attacks, and none has seen it")
    if "MiB" not in HOLES[hole] and "descriptors" not in HOLES[hole]:
        assert f"seed {seed}, message " in outcome.violations[0]


@pytest.mark.parametrize("instruction", [b"]", b"}", b"N\x85", b"](e"])
def test_a_small_pickle_does_not_become_many_containers(instruction):
    with pytest.raises(ValueError, match="more than 131072 lists, dicts and tuples"):
        inert_pickle.loads(b"\x80\x04" + instruction * (2**18) + b".")

"""The line about who waits for whom: right for what a run was told, whatever the shares."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf.config.rollout import MOST_LAG
from rlhf.monitor.loggers import described
from rlhf.reports.advice import Dials, advice
from rlhf.reports.lanes import Shares
from rlhf.reports.run_folder import flat


def shares(idle: float = 0.1, workers: int = 2, **trainer: float) -> Shares:
    return Shares(100.0, trainer, {f"worker {number}": idle for number in range(workers)}, workers)


AHEAD = "rollout.ahead.lag=1 algo.correction=tis"
TURNS = shares(0.55, sample=0.45, learn=0.5)
SAMPLING = shares(0.12, sample=0.85, learn=0.1)
LEARNING = shares(0.9, sample=0.08, learn=0.88)
BOTH_WAIT = shares(0.45, sample=0.38, learn=0.6)
CASES = {
    "both are a good share": (TURNS, {}, f"the workers for it 55%: with {AHEAD} both go on at once"),
    "the correction is there": (TURNS, {"corrected": True}, "with rollout.ahead.lag=1 both"),
    "by NCCL": (TURNS, {"keeps_versions": False}, f"with transfer=ipc {AHEAD} both"),
    "in one process": (TURNS, {"own_process": False}, f"take turns in one process: transfer=ipc {AHEAD}"),
    "asleep on one GPU": (TURNS, {"sleeps": True}, f"(rollout.gpus), rollout.sleep_level=0 and {AHEAD}"),
    "sampling alone": (SAMPLING, {}, "waits for samples 85% of the time: add a worker (rollout.workers=3)"),
    "while it runs": (SAMPLING, {"ended": False}, "add a worker (rlhf scale RUN_DIR 3)"),
    "by others' servers": (SAMPLING, {"elsewhere": True}, "add a worker (3 in transfer.sender.url)"),
    "by others' servers, now": (SAMPLING, {"elsewhere": True, "ended": False}, "(rlhf scale RUN_DIR --join URL)"),
    "a worker a prompt": (SAMPLING, {"prompts": 2}, "more workers than prompts (2) help nobody: shorten answers"),
    "sampling, in one process": (SAMPLING, {"own_process": False}, "(transfer=ipc rollout.workers=2)"),
    "nobody, in its phase": (shares(0.7, sample=0.85, learn=0.1), {}, "the workers have nothing to do 70% of it"),
    "learning alone": (LEARNING, {}, "the workers wait 90% of the time, and learning takes 88% of it: a faster"),
    "ahead, busy workers": (shares(0.05, sample=0.4, learn=0.58), {"lag": 1}, "are busy: add a worker (rollout."),
    "ahead, both wait": (BOTH_WAIT, {"lag": 1}, "45%: rollout.ahead.order=free rollout.ahead.lag=2, or"),
    "a queue, both wait": (BOTH_WAIT, {"lag": 3, "free": True}, "the workers wait 45%: rollout.ahead.lag=4, or"),
    "as far ahead as can be": (BOTH_WAIT, {"lag": MOST_LAG, "free": True}, "what lies between takes the time (rewards"),
    "ahead, idle workers": (shares(0.7, 4, sample=0.02, learn=0.9), {"lag": 1}, "2 of 4 would do (rollout.workers=2)"),
    "far ahead, idle workers": (shares(0.7, 4, learn=0.9), {"lag": 8, "free": True}, "(8) samples would be fresher"),
    "far ahead, one idle": (shares(0.7, 1, learn=0.9), {"lag": 2, "free": True}, "would not; with a lower rollout."),
    "ahead, one idle worker": (shares(0.7, 1, sample=0.02, learn=0.9), {"lag": 1}, "a faster trainer would help"),
    "ahead, in balance": (shares(0.15, sample=0.05, learn=0.9), {"lag": 1}, "nobody waits much: the trainer for"),
    "weights": (shares(transfer=0.31, sample=0.3, learn=0.3), {}, "moving weights takes 31% of the time: python -m"),
    "weights, in a queue": (shares(transfer=0.31, learn=0.6), {"lag": 2, "free": True}, "rollout.in_flight=keep lets"),
    "weights alone": (shares(transfer=0.3, learn=0.6), {"lag": 2, "free": True, "waits": False}, "transfer.doctor"),
    "probes": (shares(verify=0.31, learn=0.6), {}, "raise transfer.verify_every"),
    "evaluations": (shares(evaluate=0.4, sample=0.3, learn=0.3), {"lag": 1}, "evaluations take 40% of the time"),
    "checkpoints": (shares(checkpoint=0.4, sample=0.3, learn=0.3), {}, "raise checkpoint.every"),
    "rewards": (shares(reward=0.4, sample=0.3, learn=0.3), {}, f"a faster reward would help; with {AHEAD} they"),
    "gold scores": (shares(sample=0.3, learn=0.3), {}, "what is in no phase takes 40% of the time"),
    "pairs": (shares(1.0, learn=0.9), {"samples": False}, "learning takes 90% of the time, and nothing else much"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_advice_says_the_share_and_the_key_that_changes_it(case):
    measured, told, expected = CASES[case]
    said = advice(measured, Dials(**told))
    assert expected in said and "\n" not in said, said


def test_a_run_whose_configuration_is_not_known_gets_no_key():
    assert advice(TURNS, Dials.of({}, ended=True)) == (
        "the trainer waits for samples 45% of the time, and the workers have nothing to do 55%"
    )


@given(
    st.dictionaries(st.sampled_from(["sample", "learn", "transfer", "evaluate", "other"]), st.floats(0, 1)),
    st.floats(0, 1),
    st.integers(0, 9),
    st.builds(
        Dials,
        **{"lag": st.integers(0, MOST_LAG)},
        **{each.name: st.booleans() for each in fields(Dials) if each.type == "bool"},
    ),
)
@example({"learn": 0.9}, 1.0, 3, Dials(lag=1))
def test_there_is_one_line_whatever_was_measured_and_none_that_asks_for_what_is_there(trainer, idle, workers, dials):
    said = advice(shares(idle, workers, **trainer), dials)
    assert said and "\n" not in said and "{" not in said
    assert f"rollout.ahead.lag={dials.lag}" not in said.replace(",", " ").split()
    assert not (dials.corrected and "algo.correction" in said)
    assert f"workers={workers} " not in said and "workers=0" not in said


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", Dials()),
        ("rollout.ahead.lag=1 algo.correction=tis", Dials(lag=1, corrected=True)),
        ("transfer=disk algo.correction=icepop prompts_per_step=4", Dials(corrected=True, prompts=4)),
        (
            "rollout.ahead.order=free rollout.ahead.lag=3 algo.correction=tis rollout.in_flight=keep",
            Dials(lag=3, free=True, waits=False, corrected=True),
        ),
        ("transfer=gloo", Dials(keeps_versions=False)),
        ("transfer.staging=live", Dials(keeps_versions=False)),
        ("transfer=local", Dials(keeps_versions=False, own_process=False)),
        ("transfer/sender=ray", Dials()),
        ("transfer.sender.url=[http://127.0.0.1:1] transfer=disk", Dials(elsewhere=True)),
        ("rollout=vllm rollout.sleep_level=1", Dials(sleeps=True)),
        ("algo=dpo", Dials(samples=False, corrected=True)),
    ],
)
def test_what_advice_depends_on_is_read_from_a_runs_configuration(compose_run, overrides, expected):
    config = compose_run(*overrides.split())
    assert Dials.of(flat(described(config)), ended=True) == expected


def test_yaml_that_takes_off_for_false_has_no_correction():
    assert not Dials.of({"rollout.workers": 1, "algo.correction": False}, ended=True).corrected

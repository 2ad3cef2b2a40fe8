"""Who did what when: noted by any thread, a line a step, in a small file that outlives kills and full disks."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.assembly.outcome import reported
from rlhf.monitor import lanes as module
from rlhf.monitor.lanes import Lanes
from rlhf.reports.lanes import FILE, History, Line, history, in_order, merged, shares, summed
from rlhf.reports.run_folder import json_lines
from rlhf.run import run

SMALL = ("experiment=smoke", "logger=jsonl", "task.held_out=8", "task.prompts=64", "sft.steps=2", "prompts_per_step=4")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / FILE


def told(path: Path) -> History:
    return history(json_lines(path))


def steps(lanes: Lanes, numbers, began: float = 0.0) -> float:
    """Steps of a second: half of it waits for worker 0, which is busy meanwhile; the end of the last."""
    for number in numbers:
        lanes.asked("worker 0 (http://127.0.0.1:1)", began, began + 0.5)
        lanes.note("trainer", "sample", began, began + 0.5)
        lanes.note("trainer", "learn", began + 0.5, began + 1)
        lanes.write(number)
        began += 1
    return began


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_step_is_a_line_with_the_spans_of_each_lane_since_the_runs_begin(path):
    lanes = Lanes(path, began=100.0)
    steps(lanes, [1, 2], began=103.0)
    lanes.note("trainer", "evaluate", 105.0, 105.25)
    lanes.close()
    rows = json_lines(path)
    assert rows[1] == {
        "step": 2,
        "until": 5.0,
        "lanes": {"worker 0": [["sample", 4.0, 4.5]], "trainer": [["sample", 4.0, 4.5], ["learn", 4.5, 5.0]]},
    }
    assert rows[2] == {"step": 2, "until": 5.25, "lanes": {"trainer": [["evaluate", 5.0, 5.25]]}}


def test_threads_note_at_once_and_nothing_is_lost(path):
    lanes, threads = Lanes(path), []
    for worker in range(8):
        spans = [(worker, 2.0 * index, 2.0 * index + 1) for index in range(500)]
        threads.append(threading.Thread(target=lambda spans=spans: [lanes.asked(f"worker {w}", *s) for w, *s in spans]))
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        lanes.write(1)
    lanes.write(1)
    for thread in threads:
        thread.join(20)
    counts = [sum(len(line.spans.get(f"worker {w}", ())) for line in told(path).lines) for w in range(8)]
    assert counts == [500] * 8


def test_requests_that_overlap_or_follow_each_other_at_once_are_one_span_and_tiny_ones_none(path):
    lanes = Lanes(path)
    for began, ended in [(1.0, 2.0), (1.5, 3.0), (3.0002, 4.0), (5.0, 6.0), (7.0, 7.00001)]:
        lanes.asked("worker 0", began, ended)
    lanes.write(1)
    assert told(path).lines[0].spans == {"worker 0": [("sample", 1.0, 4.0), ("sample", 5.0, 6.0)]}


def test_the_file_of_a_run_of_many_steps_stays_small_and_its_shares_are_those_of_all_steps(path, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 20_000)
    lanes = Lanes(path)
    end = steps(lanes, range(1, 1001))
    assert path.stat().st_size < 25_000
    assert json_lines(path)[0]["before"]["step"] > 500 and told(path).lines[-1].step == 1000
    found = shares(told(path))
    assert found.seconds == end - 1 == 999, "the first step is left out"
    assert found.trainer == pytest.approx({"sample": 0.5, "learn": 0.5}) and found.idle == pytest.approx(
        {"worker 0": 0.5}
    )


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint_and_leaves_out_the_time_between(path):
    lanes = Lanes(path, began=0.0)
    steps(lanes, range(1, 8))
    lanes.close()
    later = time.monotonic()
    again = Lanes(path, began=0.0, done=4)
    assert [line.step for line in told(path).lines] == [1, 2, 3, 4]
    steps(again, [5], began=time.monotonic())
    line = told(path).lines[-1]
    assert line.step == 5 and 4.0 <= line.spans["trainer"][0][1] <= 4.0 + time.monotonic() - later
    path.unlink()
    Lanes(path, began=0.0, done=4).write(5)
    assert told(path).lines == [], "a file that is gone is no reason to stop"


@pytest.mark.parametrize("done", [None, 3])
def test_a_full_disk_ends_the_file_and_not_the_run(path, monkeypatch, done):
    steps(Lanes(path), [1, 2, 3])
    said = []
    (path.parent / f".{FILE}").mkdir()  # so that it cannot be rewritten
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    lanes = Lanes(path, done=done, say=said.append)
    steps(lanes, [4, 5, 6], began=9.0)
    lanes.close()
    assert len(said) == 1 and said[0].startswith("warning: lanes.jsonl") and "the run goes on" in said[0]
    assert [line.step for line in told(path).lines] in ([1, 2, 3, 4], [1, 2, 3])


def test_without_a_file_nothing_is_noted():
    lanes = Lanes(None)
    steps(lanes, [1])
    lanes.note("trainer", "learn", 0, 1)
    assert lanes._noted == {}


@pytest.mark.parametrize(
    "bad",
    [
        "{}",
        '{"step": 4, "until": 1, "lanes": {"trainer": [["learn", 2, 1]]}}',
        '{"step": 4, "until": 1, "lanes": {"trainer": [["learn", 0, 1e300]]}}',
        '{"step": 4, "until": NaN, "lanes": {}}',
        '{"step": 4, "until": 1, "lanes": {"trainer": []}}',
        '{"step": 4, "until": 1, "lanes": {"trainer": [[1, 2, 3]]}}',
        '{"step": 4, "until": 1, "lanes": [5]}',
        '{"before": {"step": 1, "since": 0, "until": 1, "lanes": {"a": 5}}}',
        '{"before": 7}',
        '{"step": 4, "unt',
    ],
)
def test_a_file_is_read_up_to_the_first_line_that_is_none_of_a_runs(path, bad):
    steps(Lanes(path), [1, 2, 3])
    whole = path.read_text()
    path.write_text(whole + bad + "\n" + whole)
    assert [line.step for line in told(path).lines] == [1, 2, 3]
    path.write_text(bad + "\n" + whole)
    assert shares(told(path)) is None


# --- what it says -----------------------------------------------------------------------------------------------------

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)).map(lambda s: ("sample", s[0], sum(s))), max_size=12)


@given(SPANS)
def test_merged_spans_cover_what_the_spans_cover_once(spans):
    joined = merged(spans)
    seconds = [second for _, began, ended in joined for second in range(began, ended)]
    assert sorted(seconds) == sorted({second for _, began, ended in spans for second in range(began, ended)})
    assert all(before[2] < after[1] for before, after in itertools.pairwise(joined))


@given(st.lists(SPANS, min_size=3, max_size=6), st.integers(1, 4))
def test_sums_of_a_part_and_of_the_rest_are_those_of_the_whole(steps, cut):
    """Where no span reaches back beyond the part."""
    lines = [
        Line(
            number,
            40.0 * number,
            {"worker 0": [(w, b + 40.0 * number - 40, e + 40.0 * number - 40) for w, b, e in each]},
        )
        for number, each in enumerate(steps, start=1)
        if each
    ]
    whole, part = summed(History(lines)), summed(History(lines[cut:], summed(History(lines[:cut]))))
    if whole is None:
        assert part is None
        return
    assert (part.step, part.since, part.until) == (whole.step, whole.since, whole.until)
    assert part.lanes["worker 0"].seconds == pytest.approx(whole.lanes["worker 0"].seconds)


def test_a_workers_idleness_counts_from_its_first_request_to_its_last_where_it_has_gone():
    lines = [Line(step, float(step), {"trainer": [("learn", step - 1.0, step)]}) for step in range(1, 21)]
    for step in range(1, 21):
        lanes = lines[step - 1].spans
        lanes["worker 0"] = [("sample", step - 1.0, step - 0.25)]
        if 5 < step <= 10:
            lanes["worker 1"] = [("sample", step - 1.0, step - 0.5)]
        if step > 15:
            lanes["worker 2"] = [("sample", step - 1.0, step - 0.9)]
    found = shares(History(lines))
    expected = {"worker 0": 0.25, "worker 1": 1 - 2.5 / 4.5, "worker 2": 0.9}
    assert found.idle == pytest.approx(expected) and found.workers == 2 and found.trainer == {"learn": 1.0}


def test_lanes_stand_in_the_order_of_their_numbers():
    names = ["worker 10", "server http://x:1/", "worker 2", "trainer", "worker " + "9" * 99]
    assert in_order(names)[:3] == ["trainer", "worker 2", "worker 10"] and len(in_order(names)) == 5


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", ["transfer=local", "algo=dpo algo.prompts=32 transfer=local"])
def test_a_run_writes_when_the_trainer_and_its_worker_were_busy(compose_run, tmp_path, overrides):
    run(compose_run(*SMALL, "steps=3", *overrides.split()), tmp_path)
    found = told(tmp_path / FILE)
    assert {line.step for line in found.lines} == {1, 2, 3}
    done = {what for line in found.lines for what, _, _ in line.spans.get("trainer", ())}
    assert {"learn", "evaluate", "checkpoint"} <= done and ("sample" in done) == ("dpo" not in overrides)
    rows = [
        row for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "train/loss" in row
    ]
    for row in rows:
        (line,) = [line for line in found.lines if line.step == row["step"]][:1]
        learnt = sum(ended - began for what, began, ended in line.spans["trainer"] if what == "learn")
        assert learnt == pytest.approx(row["seconds/learn"], abs=3e-4)
    asked = [span for line in found.lines for span in line.spans.get("worker 0", ())]
    assert asked and all(what == "sample" for what, _, _ in asked)


@pytest.mark.slow
def test_a_run_that_goes_on_has_each_step_once(compose_run, tmp_path):
    run(compose_run(*SMALL, "steps=2", "checkpoint.every=1", "transfer=local"), tmp_path)
    run(compose_run(*SMALL, "steps=4", "checkpoint.every=1", "transfer=local"), tmp_path, resume=True)
    found = told(tmp_path / FILE)
    assert [line.step for line in found.lines] == sorted(line.step for line in found.lines)
    ends = [line.until for line in found.lines]
    assert {line.step for line in found.lines} == {1, 2, 3, 4} and ends == sorted(ends)
    assert set(shares(found).idle) == {"worker 0"}


@pytest.mark.parametrize(("steps", "seconds", "said"), [(5, 30.0, True), (4, 99.0, False), (60, 29.0, False)])
def test_the_end_of_a_run_says_who_waited_where_it_was_long_enough(compose_run, path, capsys, steps, seconds, said):
    lines = [{"step": s, "until": s, "lanes": {"trainer": [["sample", s - 0.9, s]]}} for s in range(1, steps + 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bars = SimpleNamespace(on=True, say=print)
    site = SimpleNamespace(
        folder=path.parent, config=compose_run("transfer=local"), bars=bars, notes={}, heart=SimpleNamespace(peaks={})
    )
    rows = [{"step": s, "seconds/step": 1.0, "tokens_per_second": 9.0} for s in range(1, steps + 1)]
    reported(site, rows, seconds, [])
    told = "the trainer waits for samples 90% of the time: workers of their own sample faster (transfer=ipc"
    assert (told in capsys.readouterr().out) == said

"""The command that compares a step with TRL's: its table, its check of the work, its bars, its plan, and a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.benchmarks.trl_gpu import plan
from tests.benchmarks.trl_gpu.check import bar_lines, work_lines
from tests.benchmarks.trl_gpu.common import (
    BOTH,
    DEFAULTS,
    LEARNING,
    LIGER,
    LOGPROBS,
    OURS,
    PEAK,
    PLAIN,
    ROOT,
    TUNED,
    flops,
    results,
    work_of,
)
from tests.benchmarks.trl_gpu.plan import Job, Part, parts_of, rows_of_trl
from tests.benchmarks.trl_gpu.shapes import SHAPES, Site, sized
from tests.benchmarks.trl_gpu.table import completed, table

SMALL, LARGE = SHAPES["qwen2.5-0.5b"], SHAPES["qwen2.5-1.5b"]
STEP = {"rows": 512, "tokens": 262144, "prompt_tokens": 131072, "prompts": "a" * 64}
OTHER = STEP | {"prompts": "b" * 64}
FASTER = {"row": OURS, "step": 11.5, "sample": 8.2, "learn": 3.1, "transfer": 0.004, "trainer_gib": 30.0}


def recorded():
    """Rows as measured on an H200 (docs/benchmarks.md), with ours as it may be."""
    trl = {"sample": 15.3, "learn": 5.0, "transfer": 0.25, "trainer_gib": 60.0, "work": [STEP, OTHER]}
    return [
        {"row": PLAIN, "sample": 6.7, "work": [STEP], "start": 40.0},
        {"row": LOGPROBS, "sample": 7.9, "work": [STEP]},
        {"row": LEARNING, "learn": 2.6, "work": [STEP]},
        {"row": TUNED, "step": 21.5} | trl,
        {"row": LIGER, "step": 18.2} | trl | {"sample": 13.1, "learn": 3.9, "trainer_gib": 40.0},
        {"row": DEFAULTS, "error": "skipped: not enough of --seconds left"},
        FASTER | {"work": [STEP, OTHER]},
    ]


def test_the_table_adds_up_the_limits_and_says_samples_a_second():
    rows = {row["row"]: row for row in completed(recorded(), SMALL, PEAK)}
    assert rows[BOTH]["step"] == pytest.approx(9.3)
    assert rows[OURS]["samples_per_s"] == pytest.approx(512 / 11.5)
    assert [*rows].index(BOTH) == 3, "the sum is not behind the limits"
    assert rows[LEARNING]["mfu"] == pytest.approx(0.52, abs=0.03)


def test_the_table_has_a_line_for_each_row_and_the_reason_of_one_that_is_missing():
    lines = table(completed(recorded(), SMALL, PEAK))
    assert len({len(line) for line in lines if line.startswith("|")}) == 1, "columns are not aligned"
    assert lines[-1] == f"{DEFAULTS}: skipped: not enough of --seconds left"
    cells = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines if line.startswith("|")}
    assert (cells[TUNED], cells[BOTH], cells[DEFAULTS]) == ("21.50", "9.30", "")


def test_all_sides_that_did_the_same_work_agree():
    lines, agreed = work_lines(recorded())
    assert agreed and "the same in 6 rows" in lines[0] and "aaaaaaaaaaaa, bbbbbbbbbbbb" in lines[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"rows": 256}, "rows 256"), ({"prompts": "c" * 64}, "prompts ccc"), ({"tokens": 250000}, "tokens 250000")],
)
def test_other_work_in_a_step_is_said_with_its_step_and_both_rows(changed, said):
    rows = recorded()
    rows[-1]["work"] = [STEP, OTHER | changed]
    (line,), agreed = work_lines(rows)
    assert not agreed
    assert line.startswith("DIFFERENT WORK, step 2") and said in line and OURS in line and TUNED in line


def test_a_few_rows_that_end_early_are_no_other_work():
    rows = recorded()
    rows[-1]["work"] = [STEP | {"tokens": 262144 - 1000}, OTHER]
    assert work_lines(rows)[1]


def test_the_digest_of_prompts_depends_on_the_prompts_and_not_on_their_order():
    first, second = [1, 2, 3], [4, 5]
    assert work_of([first, second], 8) == work_of([second, first], 8)
    assert work_of([first, second], 8)["prompts"] != work_of([first, first], 8)["prompts"]


def test_bars_are_ok_or_missed():
    said = {line.split("  ")[0]: line.split()[-1] for line in bar_lines(recorded(), SMALL.bars)}
    assert said == {
        "ours: step, seconds": "ok",
        f"ours: step / {LIGER}": "ok",
        "ours: sampling / limit": "ok",
        "ours: learning / limit": "ok",
        "ours: transfer, seconds": "ok",
        f"ours: trainer's memory / {LIGER}": "0.750",  # which has no bar at 0.5B
    }
    slow = [*recorded()[:-1], FASTER | {"step": 13.0, "learn": 3.5, "trainer_gib": 41.0}]
    assert sum("MISSED" in line for line in bar_lines(slow, SMALL.bars)) == 3
    assert sum("MISSED" in line for line in bar_lines(slow, LARGE.bars)) == 3


def test_operations_are_counted_as_the_documentation_says():
    weights = 24 * (896 * 64 * 2 * (14 + 2) + 3 * 896 * 4864)
    tokens, sampled = 131072 + 262144, 262144
    attention = 12 * 24 * 14 * 64 * (tokens / 512 / 2) * tokens
    expected = 6 * weights * tokens + attention + 6 * 896 * 151936 * sampled
    assert flops(SMALL, 131072, 512, 512) == pytest.approx(expected)


def test_overrides_are_split_where_the_next_one_begins():
    (*_, lost) = parts_of(SMALL, ["ours"], {"small": "a.b={x: 1, y: 2},optim.lr=1e-5,~c=d"})
    assert lost.arguments == ("ours, small", "a.b={x: 1, y: 2}", "optim.lr=1e-5", "~c=d")
    assert lost.extra


def test_what_fits_is_asked_of_ours_alone():
    assert [part.module for part in parts_of(SHAPES["qwen2.5-7b"], plan.PARTS, {})] == ["ours", "ours"]


def test_trls_defaults_are_measured_only_in_time_that_nothing_else_needs():
    assert rows_of_trl(SMALL, 280, 0) == (TUNED, LIGER, DEFAULTS)
    assert rows_of_trl(SMALL, 280, 10) == (TUNED, LIGER)


def test_other_sizes_of_a_step_keep_micro_batches_within_it():
    small = sized(SMALL, 2, 4, 16)
    assert (small.rows, small.trl_rows, small.liger_rows, small.longest) == (8, 8, 8, 512)


def job(tmp_path, seconds, log="", code=""):
    """A job whose processes write `log` and end with `code`, and the parts that it ran."""
    site = Site(tmp_path / "nano", SHAPES["nano"], 3)
    site.write()
    ran = []

    class Recording(Job):
        def _process(self, site, part, limit, arguments):
            ran.append(part.name)
            (site.folder / f"{part.name}.log").write_text(log)
            return "" if part.name == "make" else code

    return Recording({"nano": site}, time.monotonic() + seconds, False, set(), lambda _: None), ran


def test_a_part_that_fails_costs_its_rows_and_says_why(tmp_path):
    work, _ = job(tmp_path, 100, 'RESULT {"row": "one", "step": 2.0}\nRESULT {"row": "tw', "ended with 1: no memory")
    rows = work.run([("nano", Part("both", "ours", ("one", "two"), 10))])
    assert {row["row"]: row.get("step", row.get("error")) for row in rows["nano"]} == {
        "one": 2.0,
        "two": "ended with 1: no memory",
    }


def test_the_least_important_parts_come_last_and_are_skipped_without_time(tmp_path):
    work, ran = job(tmp_path, 20, 'RESULT {"row": "one", "step": 2.0}')
    rows = work.run([("nano", Part("b", "ours", ("two",), 60, extra=True)), ("nano", Part("a", "ours", ("one",), 10))])
    assert ran == ["make", "a"]
    assert rows["nano"][1]["error"].startswith("skipped: ")


def test_a_process_that_hangs_is_ended_at_its_limit_and_a_log_names_its_error(tmp_path):
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    assert plan._ended(process, 0.5) is None
    assert process.poll() is not None and time.monotonic() - began < 30
    log = tmp_path / "log"
    log.write_text("hello\ntorch.OutOfMemoryError: CUDA out of memory\nat the end\n")
    assert plan.reason(log) == "torch.OutOfMemoryError: CUDA out of memory"


def test_a_folder_tells_its_parts_the_shape(tmp_path):
    site = Site(tmp_path / "nano", replace(SHAPES["nano"], new=8), 2)
    assert not site.write() and site.write(), "the same shape is not known again"
    assert Site.read(str(site.folder)) == site


class FakeGeneration:
    """What GRPOTrainer holds of vLLM."""

    llm = None

    def generate(self, prompts, **_):
        return prompts, [[7] * 3 for _ in prompts], None, None

    def sync_weights(self):
        time.sleep(0.01)


class FakeTrainer:
    """The parts of GRPOTrainer that are timed, in its order."""

    def __init__(self, args, train_dataset, callbacks, **_):
        self.args, self.data, self.callbacks = args, train_dataset, callbacks
        self.vllm_generation = FakeGeneration()
        self.accelerator = SimpleNamespace(free_memory=lambda: None)

    def _generate_and_score_completions(self, prompts):
        self.vllm_generation.sync_weights()
        self.vllm_generation.generate(prompts=prompts)

    def train(self):
        (watch,) = self.callbacks
        for step in range(self.args.max_steps):
            watch.on_step_begin(None, None, None)
            self._generate_and_score_completions([[step, row] for row in range(16)])
            watch.on_step_end(None, None, None)


def test_a_row_of_trl_says_the_seconds_of_its_parts_and_what_it_trained_on(monkeypatch, tmp_path, capsys):
    from tests.benchmarks.trl_gpu import trl_trainer

    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(GRPOTrainer=FakeTrainer, GRPOConfig=SimpleNamespace))
    monkeypatch.setattr(trl_trainer.AutoTokenizer, "from_pretrained", lambda _: None)
    monkeypatch.setattr(trl_trainer.torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(trl_trainer, "most_allocated", lambda: 12.0)
    site = Site(tmp_path, SHAPES["nano"], 3)
    shared = trl_trainer.SharedLlm(dict, start=40.0, gib=2.0)
    trl_trainer.measure(TUNED, site, None, shared, trl_trainer.variants(site)[TUNED])
    said = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert (said["row"], said["trainer_gib"], said["start"], len(said["steps"])) == (TUNED, 10.0, 40.0, 3)
    assert said["transfer"] >= 0.01 and said["step"] >= said["sample"] + said["transfer"] - 1e-4
    assert said["work"][1] == work_of([[1, row] for row in range(16)], 48)
    assert shared.start is None, "vLLM started once"


@pytest.mark.slow
def test_a_dry_run_measures_what_a_cpu_can_and_finds_the_same_work(tmp_path):
    report, work = tmp_path / "report.json", tmp_path / "work"
    command = [sys.executable, "-m", "tests.benchmarks.compare_trl_gpu", "--dry", "--steps", "2"]
    done = subprocess.run(
        [*command, "--work", str(work), "--json", str(report)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())["shapes"]["nano"]
    rows = {row["row"]: row for row in told["rows"]}
    assert rows[OURS]["step"] > 0 and rows[LEARNING]["learn"] > 0, done.stdout
    assert "error" in rows[TUNED] and "error" in rows[PLAIN]
    assert "the same in 3 rows" in told["work"][0]
    assert results(work / "nano" / "learning.log")
    assert "| ours, its defaults" in done.stdout

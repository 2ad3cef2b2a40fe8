"""The page about runs: it holds what happened, is small, needs nothing else, and runs nothing that a model has said."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.report import main
from rlhf.reports.summary import PHASES, lost_rewards, summarise, write_summary

STEPS = 100
HOSTILE = '<script>document.title="owned"</script><img src=x onerror="alert(1)">&lt;b&gt; \u202e\x00 </td></table>'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --virtual-time-budget=5000 --window-size=1280,2000"""


def row(step: int, shift: float) -> dict[str, float]:
    """One step's metrics: reward rises, the KL runs away from step 60 on."""
    metrics = {
        "step": step,
        "train/reward": math.tanh(step / 30) + shift,
        "train/kl": 0.01 * step,
        "train/entropy": 2.0,
    }
    metrics |= {
        f"train/{name}": 0.1 for name in ("entropy", "grad_norm", "tokens_per_row", "zero_std", "truncated", "mismatch")
    }
    metrics |= {f"seconds/{phase}": 0.01 + 0.001 * (step % 7) for phase in PHASES}
    metrics |= {"seconds/step": 0.06, "tokens_per_second": 900.0, "transfer/write_seconds": 0.004}
    metrics |= {"rollout/lag": 0.0, "rollout/lag_max": 0.0}
    return metrics | ({"alarm/kl": 1.0} if step >= 60 else {})


@dataclass
class Written:
    """How a run is left in its folder."""

    algo: str = "grpo"
    seed: int = 0
    answer: str = "aabb"
    status: str = "finished"
    few: bool = False  # few metrics: few figures, which take time


def write_run(folder: Path, **options) -> Path:
    """A run of 100 steps with four samples each, as a run leaves it."""
    this = Written(**options)
    algo, seed, answer, status = this.algo, this.seed, this.answer, this.status
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(f"algo: {{name: {algo}, clip_low: 0.2}}\nseed: {seed}\nsteps: 100\n")
    rows = [row(step, 0.1 * seed) for step in range(1, STEPS + 1)]
    if this.few:
        rows = [{"step": each["step"], "train/reward": each["train/reward"]} for each in rows]
    rows += [{"step": step, "eval/gold": 0.3 + step / 200, "eval/reward": 0.2} for step in range(0, STEPS + 1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    samples = [
        {"step": step, "prompt": f"{answer} ?", "answer": f"{answer} {n}", "reward": step / 50 - n, "gold": n / 3}
        for step in range(1, STEPS + 1)
        for n in range(4)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    numbers = (
        {"gold_end": 0.8, "reward_end": 0.2} if status == "finished" else {"error": "Traceback\nOSError: disk full"}
    )
    write_summary(folder, status, [f"algo={algo}", "steps=100", f"seed={seed}"], numbers)
    return folder


class Read(HTMLParser):
    """What a page holds: its tags with their attributes, and the text outside of the style sheet."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.styled = "", False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.styled = tag == "style"

    def handle_data(self, data):
        self.text += "" if self.styled else data + "\n"


def drawings(read: Read) -> dict[str, str]:
    """The titles of the page's figures -> what is drawn, as SVG."""
    images = [attributes for tag, attributes in read.tags if tag == "img"]
    return {str(each["alt"]): b64decode(str(each["src"]).partition(",")[2]).decode() for each in images}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run whose model says what a page must not obey, and its report."""
    folder = write_run(tmp_path_factory.mktemp("reported") / "run", answer=HOSTILE + "\ud800")
    main([str(folder)])
    return folder


def test_a_run_of_100_steps_is_one_small_page_with_curves_alarms_time_transfer_and_samples(reported):
    folder = reported
    page = folder / "report.html"
    read = Read(page)
    assert page.stat().st_size < 2_000_000
    drawn = drawings(read)
    assert {"Reward", "KL to the reference, nats a token", "Milliseconds a step, by phase"} < set(drawn)
    assert {"Weight transfer, milliseconds a step", "Lag of sampled tokens, versions"} < set(drawn)
    assert "alarm kl, step 60" in drawn["Reward"] and "alarm" not in drawn["Entropy, nats a token"]
    assert all(phase in drawn["Milliseconds a step, by phase"] for phase in PHASES)
    assert re.search(r"alarm kl\s*: first at step 60, in 41 rows", read.text)
    assert "Who waits" not in read.text, "it has no lanes.jsonl"
    assert {path.stem for path in (folder / "report").glob("*.png")} >= {"reward", "phases", "transfer", "lag"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "report").glob("*.png"))


def test_samples_stand_by_reward_with_gold_beside_it_the_best_and_the_worst(reported):
    folder = reported
    table = (folder / "report.html").read_text().partition("<h2>Samples</h2>")[2].partition("</table>")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table)
    rewards, golds = [float(cell) for cell in cells[::6]], [float(cell) for cell in cells[1::6]]
    assert len(rewards) == 200 and rewards == sorted(rewards, reverse=True)
    assert (rewards[0], rewards[-1]) == (2.0, pytest.approx(0.02 - 3)), "of 400"
    assert golds[0] == 0.0 and golds[-1] == 1.0
    assert table.count('class="differs"') > 10, "a high reward for what gold calls poor"


def test_what_a_model_says_is_text_and_the_page_takes_nothing_from_elsewhere(reported):
    folder = reported
    read = Read(folder / "report.html")
    assert not {"script", "link", "iframe", "object", "a", "form", "base"} & {tag for tag, _ in read.tags}
    named = [(tag, name, value) for tag, attributes in read.tags for name, value in attributes.items()]
    assert not [name for _, name, _ in named if name.startswith("on")]
    assert all(str(v).startswith("data:image/svg+xml;base64,") for _, name, v in named if name in ("src", "href"))
    policy = next(attributes["content"] for _, attributes in read.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in str(policy) and "script" not in str(policy)
    assert '<script>document.title="owned"</script><img src=x' in read.text, "it is there, as text"
    assert "url(" not in (folder / "report.html").read_text()
    for drawing in drawings(read).values():
        assert not re.search(r'(href|src)="(?!#)', drawing) and "<script" not in drawing


def test_what_a_run_has_made_of_its_gpu_is_in_the_head_and_drawn(tmp_path):
    folder = write_run(tmp_path / "run", few=True)
    numbers = {"train/mfu": 0.41, "gpu_idle/sample": 0.12, "gpu_idle/learn": 0.0, "tokens_per_second/sampled": 5000.0}
    rows = [
        {"step": step, "seconds/step": 1.0, "seconds/transfer": 0.1, "tokens_per_second": 900.0, **numbers}
        for step in range(1, 9)
    ]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
    memory = {"gpu_memory_mib/trainer": 20480.0, "gpu_memory_mib/worker-0": 10240.0}
    write_summary(folder, "finished", [], {"gold_end": 0.8, **memory})
    main([str(folder)])
    read = Read(folder / "report.html")
    told = dict(re.findall(r"<b>([^<]+)</b><span>([^<]+)</span>", (folder / "report.html").read_text()))
    assert told["41.0%"] == "MFU of learning" and told["12%"] == "GPU idle while sampling"
    assert told["20.0 GiB"] == "GPU memory, trainer" and told["10.0 GiB"] == "GPU memory, worker-0"
    assert told["5000"] == "tokens a second, while sampling"
    drawn = drawings(read)
    assert {"Tokens a second", "MFU of learning", "Share of a phase without a kernel on the GPU"} < set(drawn)


def test_samples_without_a_reward_are_told_by_what_befell_them():
    common = {"seconds/step": 1.0, "seconds/transfer": 0.1}
    counts = [{"train/reward_timed_out": 2.0}, {"train/reward_timed_out": 1.0, "train/reward_refused": 4.0}, {}]
    summary = summarise([{"step": step, **common, **each} for step, each in enumerate(counts, start=1)])
    assert (summary["rewards_timed_out"], summary["rewards_refused"]) == (3.0, 4.0)
    assert lost_rewards(summary) == {"rewards lost: timed out": "3", "rewards lost: refused": "4"}
    assert lost_rewards(summarise([{"step": 1, **common}])) == {}


def test_who_waits_for_whom_is_said_with_what_to_do_and_drawn_lane_by_lane(tmp_path):
    folder = write_run(tmp_path / "run", few=True)
    dials = "rollout: {workers: 2}\nalgo: {correction: tis}\ntransfer: {sender: {url: []}, staging: arena}\n"
    (folder / ".hydra" / "config.yaml").write_text(dials)
    for step in range(1, 31):
        sampling = {f"worker {index}": [["sample", step - 1, step - 0.6 + 0.1 * index]] for index in range(2)}
        trainer = {"trainer": [["sample", step - 1, step - 0.5], ["learn", step - 0.5, step]]}
        with open(folder / "lanes.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "until": step, "lanes": trainer | sampling}) + "\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(
            json.dumps({"step": step, "rollout/queue": step % 3, "rollout/lag_1": 1}) + "\n" for step in range(5)
        )
    main([str(folder)])
    read, page = Read(folder / "report.html"), (folder / "report.html").read_text()
    assert (
        "trainer waits for samples 50% of the time, and the workers for it 55%: with rollout.ahead.lag=1 both"
        in read.text
    )
    told = {name: value for value, name in re.findall(r"<b>([^<]+)</b><span>([^<]+)</span>", page)}
    assert told["trainer waits for samples"] == told["worker 1 has no request"] == "50%"
    assert told["worker 0 has no request"] == "60%"
    drawn = drawings(read)
    assert all(
        word in drawn["Who did what when"] for word in ("trainer", "worker 1", "waits for samples", "learns", "21")
    )
    assert {"Whole groups that wait for the trainer", "Share of the tokens that are so many versions old"} <= set(drawn)


def test_a_long_answer_is_cut_and_the_page_stays_small(tmp_path):
    folder = write_run(tmp_path / "run", answer="long " * 4000, few=True)
    main([str(folder)])
    page = (folder / "report.html").read_text()
    assert len(page) < 2_000_000 and "… (20002 characters)" in page


def test_runs_are_compared_by_leaderboard_curves_bars_and_the_dials_that_differ(tmp_path):
    sweep = tmp_path / "sweep"
    write_run(sweep / "0", algo="grpo", seed=0)
    write_run(sweep / "1", algo="ppo", seed=0, few=True)
    write_run(sweep / "2", algo="ppo", seed=1, few=True, status="failed")
    main([str(sweep)])
    read = Read(sweep / "report.html")
    drawn = drawings(read)
    assert "All were told" in read.text and "OSError: disk full" in read.text and "1 of 2" in read.text
    assert "algo=ppo" in drawn["Gold reward (held-out prompts)"]
    assert {"Weight transfer a step", "Share of a step that waits", "A step by phase"} < set(drawn)
    dials = (sweep / "report.html").read_text().partition("Dials that differ</h2>")[2].partition("</table>")[0]
    assert "algo.name" in dials and '<td class="text">seed</td>' in dials
    assert "clip_low" not in dials and "steps" not in dials
    assert (sweep / "report" / "stall.png").exists() and (sweep / "report" / "2" / "reward.png").exists()


@pytest.mark.slow
def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(
        [str(write_run(tmp_path / "a" / "run", few=True)), str(write_run(tmp_path / "b" / "run", algo="ppo", few=True))]
    )
    page = (tmp_path / "report.html").read_text()
    assert '<th class="text">a/run</th><th class="text">b/run</th>' in page
    assert {path.name for path in (tmp_path / "report").iterdir() if path.is_dir()} == {"a-run", "b-run"}


@pytest.mark.parametrize(
    "last",
    [
        b'{"step": 101, "train/rew',
        b"\xe3\x00\xff" * 99,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (b"5\n", b"[]\n")),
    ],
)
def test_a_run_whose_last_line_is_cut_or_rubbish_is_reported_up_to_there(tmp_path, last):
    folder = write_run(tmp_path / "run", few=True)
    (folder / "summary.json").unlink()
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(last)
    main([str(folder)])
    text = Read(folder / "report.html").text
    assert "unfinished" in text and "0.300 → 0.800" in text


def test_a_run_without_numbers_has_a_page_that_says_why(tmp_path):
    folder = write_run(tmp_path / "run", status="failed")
    (folder / "metrics.jsonl").unlink()
    main([str(folder)])
    text = Read(folder / "report.html").text
    assert "OSError: disk full" in text and "logger=jsonl writes it" in text


def test_a_folder_without_runs_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "is neither a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium): nothing to look with")
def test_a_browser_draws_the_page_and_runs_nothing_of_it(reported, tmp_path):
    from matplotlib.image import imread

    folder = reported
    page = f"file://{folder / 'report.html'}"

    def browse(*arguments: str) -> str:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [str(CHROMIUM), *FLAGS.split(), profile, *arguments, page]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout

    seen = browse("--dump-dom")
    assert "<title>grpo, seed 0, in run" in seen, "no script has renamed it"
    assert seen.count("<img ") == len(drawings(Read(folder / "report.html"))), "no image of a sample's making"
    assert seen.count("<tr") > 200 and "&lt;script&gt;document.title=" in seen
    browse(f"--screenshot={tmp_path / 'page.png'}")
    pixels = (imread(tmp_path / "page.png")[..., :3] * 255).round().astype(int)

    def count(colour: str) -> int:
        wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
        return int((abs(pixels - wanted).max(axis=-1) < 12).sum())

    assert pixels.shape[:2] == (2000, 1280)
    assert count("#f8fafc") > 200_000, "the page's own ground: its style sheet was read"
    assert count("#2563eb") > 2_000 and count("#f59e0b") > 500, "curves and stacked phases are drawn"
    assert count("#dc2626") > 300, "and alarms are marked"

"""The tables of docs/algorithms.md say what conf/ composes and what a run logs; every page is found, and every link."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf.config.algo import Aggregation
from rlhf.run import run

ROOT = Path(__file__).resolve().parent.parent
ADVANTAGES = {
    "group_norm": "(R - group mean) / group std",
    "group_mean": "R - group mean",
    "leave_one_out": "R - mean of the group's others",
    "reinforce_pp": "discounted return, whitened",
    "reinforce_pp_baseline": "R - group mean, whitened",
    "gae": "GAE with a critic, whitened",
}
RATIOS = {"clip": "a token", "gspo": "a row", "reinforce": "none"}
AGGREGATIONS = {
    Aggregation.token_mean: "token mean",
    Aggregation.seq_mean_token_mean: "mean over rows of token means",
    Aggregation.seq_mean_token_sum_norm: "sum / (rows x max_new_tokens)",
}
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
TASK = ("task.held_out=8", "task.prompts=64")
SMALL = ("experiment=smoke", "logger=jsonl", "transfer=local", "sft.steps=2", "steps=1", *TASK)


def table(first: str) -> list[list[str]]:
    """The cells of the table whose first column has this heading, without the heading."""
    lines = (ROOT / "docs" / "algorithms.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    body = lines[start + 2 :]
    end = next((number for number, line in enumerate(body) if not line.startswith("|")), len(body))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body[:end]]


def test_the_table_of_algorithms_has_one_row_for_each_choice():
    choices = {path.stem for path in (ROOT / "conf" / "algo").glob("*.yaml")} - {"dpo"}  # which has no such parts
    assert {row[0].strip("`") for row in table("algo")} == choices


@pytest.mark.parametrize("row", table("algo"), ids=lambda row: row[0].strip("`"))
def test_the_table_of_algorithms_says_what_is_composed(compose_run, row):
    name, advantage, ratio, clip, aggregation, kl, paper = (cell.strip("` ") for cell in row)
    algo = compose_run(f"algo={name}").rl
    assert advantage.partition(", of groups")[0] == ADVANTAGES[algo.advantage]
    assert ("of groups with a signal" in advantage) == bool(algo.dynamic_sampling)
    assert ratio.startswith(RATIOS.get(algo.loss, "a token"))
    bounds = [] if clip.startswith("none") else [float(bound) for bound in clip.split(" / ")]
    clips = algo.loss in ("clip", "gspo", "cispo")
    assert bounds == ([algo.clip_low, algo.clip_high] if clips else [])
    assert aggregation == AGGREGATIONS[algo.aggregation]
    assert kl == (f"in the {algo.kl_in.value}, {algo.kl_coef:g}" if algo.kl_coef else "none")
    assert paper in (ROOT / "conf" / "algo" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        "algo=ppo algo.critic_warmup_steps=0 alarms.truncated=0",
        "algo=grpo reward=sum reward.parts={one:{kind:function,function:examples.reward_functions:brevity}}",
        "algo=dpo algo.prompts=32 prompts_per_step=4",
    ],
)
def test_every_metric_that_a_run_logs_is_in_the_table_of_metrics(compose_run, tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(ROOT)
    run(compose_run(*SMALL, *overrides.split()), tmp_path)
    logged = {name for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    known = {name for row in table("metric") for name in re.findall(r"`([^`]+)`", row[0])}
    patterns = [re.compile(re.sub("[A-Z]+", "[a-z_0-9]+", name)) for name in known]
    assert len(logged) > 20
    assert {name for name in logged - {"step"} if not any(each.fullmatch(name) for each in patterns)} == set()


def test_the_readme_lists_every_page_and_every_link_leads_somewhere():
    pages = sorted((ROOT / "docs").glob("*.md"))
    listed = (ROOT / "README.md").read_text().partition("## Documentation")[2]
    assert [page.name for page in pages if f"](docs/{page.name})" not in listed] == []
    links = {(page, link) for page in [ROOT / "README.md", *pages] for link in LINK.findall(page.read_text())}
    assert len(links) > 30
    assert [f"{page.name}: {link}" for page, link in sorted(links) if not leads_somewhere(page, link)] == []


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether there is such a file, with such a heading."""
    name, _, heading = link.partition("#")
    target = page.parent / name if name else page
    if not heading:
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return heading in {re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(r"`((?:rlhf|transfer|tests|examples)/[\w./]+(?:\.\w+|/))`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_picture_of_the_house_has_every_folder():
    picture = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    folders = {path.parent.name for package in ("rlhf", "transfer") for path in (ROOT / package).glob("*/__init__.py")}
    assert folders == {name for name in re.findall(r"\b(\w+)/", picture)} - {"rlhf", "transfer", "conf"}

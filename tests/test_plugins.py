"""Parts of one's own: composed, checked and made as ours are, and one line about each that is not as parts are."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import invalidate_caches
from pathlib import Path

import pytest
import torch
import yaml
from forked import FRESH
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from rlhf import resume
from rlhf.compose import CONF, checked, misplaced, prepare, register, unknown_choices
from rlhf.evaluate import runs_of
from rlhf.learning.estimates import Signal, estimate
from rlhf.learning.optimizer import make_optimizer
from rlhf.models.tokenizer import make_tokenizer
from rlhf.plugins import PartError, found, offers, registry
from rlhf.plugins.hydra_choices import Later
from rlhf.plugins.part import KINDS
from rlhf.plugins.wanted import wanted
from rlhf.preflight.parts import check_parts
from rlhf.preflight.plan import files
from rlhf.reports.run_folder import is_run
from rlhf.reports.summary import read_summary
from rlhf.rewards import check_reward, given_rewards
from rlhf.rewards.own import OwnReward
from rlhf.run import run
from rlhf.shell.search_path import of_command, started_in
from rlhf.tasks import make_task, read_task
from rlhf.types import Prompt

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "own_parts.py"
OFFERED = {  # of the example, as entry points
    "tasks": "count = acme_parts:count",
    "environments": "try_again = acme_parts:try_again",
    "rewards": "short = acme_parts:short",
    "losses": "asymmetric = acme_parts:asymmetric",
    "advantages": "best_half = acme_parts:best_half",
    "optimizers": "sgd = acme_parts:sgd",
    "loggers": "best = acme_parts:Best",
}
ALL = (
    *("task=count", "task/environment=try_again", "reward=short", "reward.longest=3"),
    *("algo.loss=asymmetric", "algo.advantage=best_half", "optim=sgd", "optim.lr=0.02", "logger=[jsonl,best]"),
)
HEAD = """\
from dataclasses import dataclass
from rlhf.config import OptimConfig, RewardConfig, TaskConfig
from rlhf.config.algo import AlgoConfig
from rlhf.plugins import advantage, loss, optimizer, reward, task
"""
CONFIG = "@dataclass(slots=True, kw_only=True)\nclass Mine(TaskConfig):\n    size: int = 1\n\n"
MAKER = "\ndef make(config, seed): ...\n"

OWN_ALGO = """
@dataclass(slots=True, kw_only=True)
class Mine(AlgoConfig):
    advantage: str = "group_mean"
    tau: float = 2.0

    def __post_init__(self):
        AlgoConfig.__post_init__(self)
        if self.tau <= 0:
            raise ValueError(f"algo.tau must be greater than 0 (got {self.tau})")

@loss("mine", Mine)
def f(algo, logprobs, old, advantages, mask):
    return -algo.tau * advantages * logprobs, logprobs - old
"""


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """An empty working folder, and the parts as they were before the test."""
    register()  # what is there in any case
    before, repo = dict(registry._parts), ConfigStore.instance().repo
    choices = {(id(group), name) for group, name in _choices(repo)}
    for name in _of_tests():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    offers.offers.cache_clear()
    found.warn.cache_clear()
    invalidate_caches()
    yield tmp_path
    registry._parts.clear()
    registry._parts.update(before)
    for group, name in list(_choices(repo)):
        if (id(group), name) not in choices:
            del group[name]
    offers.offers.cache_clear()
    for name in _of_tests():
        del sys.modules[name]


def _of_tests():
    """The modules that are imported by names that tests give theirs."""
    return [name for name in sys.modules if name.partition(".")[0] in ("mine", "acme", "broken", "other", "examples")]


def _choices(group):
    """Every part that Hydra knows: where it stands, and by which name."""
    for name, node in list(group.items()):
        if isinstance(node, Later):
            yield group, name
        elif isinstance(node, dict):
            yield from _choices(node)


def composed(*arguments: str):
    """The run of a command line, as the command makes it."""
    where, overrides = of_command(arguments)
    prepare(overrides, where)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(where.compose("config", overrides))


def installed(folder: Path, package: str, source: str, **offered: str) -> None:
    """A package in `folder` that offers parts: kind="name = module:thing"."""
    folder.mkdir(exist_ok=True)
    (folder / f"{package}.py").write_text(source)
    (folder / f"{package}-1.dist-info").mkdir()
    (folder / f"{package}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    groups = [f"[rlhf.{kind}]\n{told}\n" for kind, told in offered.items()]
    (folder / f"{package}-1.dist-info" / "entry_points.txt").write_text("\n".join(groups))
    sys.path.insert(0, str(folder))
    invalidate_caches()
    offers.offers.cache_clear()


def test_every_maker_and_check_of_ours_is_a_function_that_is_there():
    ours = [part for part in registry.loaded() if part.ours]
    assert {part.kind for part in ours} == set(KINDS) - {"environment"}
    for part in ours:
        assert part.make is None or callable(part.maker())
        assert part.checker() is None or callable(part.checker())


def test_the_example_is_composed_checked_and_made(parts):
    sys.path.append(str(ROOT))
    (line,) = re.findall(r"(?m)^python -m rlhf\.train (plugins=.*)$", (EXAMPLE.parent / "README.md").read_text())
    run = composed(*shlex.split(line), "task/environment=try_again", "task.most=5", "optim.momentum=0.5")
    assert (run.task.most, run.task.environment.turns, run.reward.longest, run.optim.momentum) == (5, 2, 3, 0.5)
    assert (run.task.most_answers, run.algo.loss, run.algo.group_based, run.algo.has_critic) == (
        2,
        "asymmetric",
        True,
        False,
    )
    check_parts(run)
    raw = read_task(run.task, 0)
    assert raw.train == read_task(run.task, 0).train and len(raw.train) == 32 and raw.replies.turns == 2
    assert raw.gold(raw.train[0].columns, raw.train[0].demonstration) == 1.0
    mask_BT = torch.ones(4, 2)
    advantages_BT, _ = estimate(run.algo, Signal(torch.tensor([0.0, 2.0, 3.0, 3.0]), 0 * mask_BT, mask_BT, 2))
    assert advantages_BT.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    optimizer = make_optimizer(torch.nn.Linear(2, 1), run.optim, 0.5)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=count", "task.most=10"], r"task\.most must be between 1 and 9 \(got 10\)"),
        (["task=count", "+task.moist=1"], "'CountConfig' object has no attribute 'moist'"),
        pytest.param(["task=count", "task.most=few"], "Error merging override task.most=few", marks=pytest.mark.slow),
        pytest.param(
            ["algo.loss=asymetric"],
            r"algo\.loss must be one of clip, gspo, .*, asymmetric \(got 'asymetric'\)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["algo.advantage=best"],
            r"algo\.advantage must be one of group_norm, .*, best_half \(got 'best'\)",
            marks=pytest.mark.slow,
        ),
        (["algo=asymmetric"], r"algo\.loss=asymmetric has no dials of its own: choose it beside another algo"),
        pytest.param(
            ["algo.advantage=best_half", "samples_per_prompt=1"],
            "samples_per_prompt must be at least 2",
            marks=pytest.mark.slow,
        ),
        (["task=guess", "task/environment=try_again", "reward=verifier"], "leave out task/environment"),
        (
            ["reward=sum", "reward.parts={a: {kind: shortt}}"],
            r"verifier, math, model, function, http, judge, given, short \(got",
        ),
        pytest.param(
            ["reward=sum", "reward.parts={a: {kind: short, longest: 0}}"],
            r"reward\.parts\.a\.longest must be at least",
            marks=pytest.mark.slow,
        ),
        (["task=none_such"], r"Could not find 'task/none_such'(?s:.*)\tcount\n"),
    ],
)
def test_a_mistake_with_a_part_of_one_s_own_is_told_as_one_with_ours(parts, arguments, message):
    sys.path.append(str(ROOT))
    with pytest.raises(HydraException, match=message):
        composed("plugins=[examples.own_parts]", *arguments)


def test_misplaced_keys_and_unknown_choices_name_parts_of_one_s_own(parts):
    sys.path.append(str(ROOT))
    prepare(["plugins=[examples.own_parts]"])
    assert misplaced(["task=sort", "task.most=3"]) == ["that key belongs to the count task: task.most needs task=count"]
    (said,) = unknown_choices(["logger=[best,bests]"])
    assert said.startswith("logger=[best,bests]: there is no logger=bests; choose from best, console, ")
    assert not unknown_choices(["task=count,sort"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", r"plugins: mine cannot be imported, .* Python path: ZeroDivisionError: division by zero"),
        ("", "plugins: mine registers nothing: decorate what it makes"),
        (
            f'@task("mine", None){MAKER}',
            r"registers task=mine without a dataclass: .*rlhf\.config\.TaskConfig",
        ),
        (f'@task("mine", dict){MAKER}', r"task=mine with .*dict.*, which is no dataclass"),
        (f'@task("mine", OptimConfig){MAKER}', r"with OptimConfig, which must build on rlhf\.config\.TaskConfig"),
        (f'{CONFIG}@task("a-b", Mine){MAKER}', r"a name must be letters, digits and _ \(got 'a-b'\)"),
        (f'{CONFIG}@task("sort", Mine){MAKER}', "mine:make registers task=sort, which rlhf has: give it another name"),
        (f'{CONFIG.replace("slots=True, ", "")}@task("mine", Mine){MAKER}', r"mark it @dataclass\(slots=True, kw_only"),
        (f'{CONFIG}@task("mine", Mine)\n@task("yours", Mine){MAKER}', "with the dataclass of task=yours"),
        (OWN_ALGO.replace('"mine"', '"grpo"'), "mine:f registers algo=grpo, which conf/ has: give it another name"),
        (f'@loss("clip"){MAKER}', r"mine:make registers algo\.loss=clip, which rlhf has"),
    ],
)
def test_a_module_whose_parts_are_not_as_parts_are_is_told_in_one_line(parts, source, message):
    (parts / "mine.py").write_text(HEAD + source)
    with pytest.raises(PartError, match=message) as raised:
        prepare(["plugins=[mine]"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("given", ["mine", "mine.py", "[mine.py/x]", "3"])
def test_plugins_must_be_a_list_of_modules(parts, given):
    (parts / "mine.py").write_text(HEAD)
    with pytest.raises(PartError, match="plugins must be a list of modules"):
        prepare([f"plugins={given}"])


@pytest.mark.parametrize(
    ("source", "chosen", "message"),
    [
        (
            '@loss("mine")\ndef f(algo, *rest): return rest[0]',
            "algo.loss=mine",
            "fails on a trial of 4 rows: ValueError",
        ),
        (
            '@loss("mine")\ndef f(algo, *rest): return rest[0].mean(), rest[0]',
            "algo.loss=mine",
            r"a loss and a log-ratio of each token \(got a tensor \[\] and a tensor \[4, 3\]\)",
        ),
        (
            '@loss("mine")\ndef f(algo, *rest): return rest[1], rest[1]',
            "algo.loss=mine",
            "without a gradient: compute it from logprobs_BT",
        ),
        (
            '@advantage("mine", tokens=True)\ndef f(algo, signal): return signal.rewards_B, None',
            "algo.advantage=mine",
            r"of the rewards' shape, or one of the mask's \(got a tensor \[4\]\)",
        ),
        pytest.param(
            '@advantage("mine")\ndef f(algo, r): return r.what',
            "algo.advantage=mine",
            "trial of 4 rows: AttributeError",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            'loss("mine", make="nowhere:f")',
            "algo.loss=mine",
            "its maker nowhere:f cannot be imported: ModuleNotFound",
            marks=pytest.mark.slow,
        ),
        (
            CONFIG.replace("Task", "Optim") + '@optimizer("mine", Mine)\ndef f(config, named, lr): return named',
            "optim=mine",
            r"must return a torch\.optim\.Optimizer \(got list\)",
        ),
        (
            CONFIG.replace("Task", "Optim") + '@optimizer("mine", Mine)\ndef f(config, named, lr):\n'
            "    import torch\n    return torch.optim.SGD([tensor for _, tensor in named], lr=lr)",
            "optim=mine",
            "must give its optimiser the named parameters as they are",
        ),
        (
            CONFIG.replace("Task", "Optim") + '@optimizer("mine", Mine)\ndef f(config, named, lr):\n'
            "    import torch\n    return torch.optim.Adafactor(named, lr=lr)",
            "optim=mine",
            "keeps row_var, col_var, which is no tensor of its weight's shape",
        ),
        (
            CONFIG.replace("Task", "Optim") + '@optimizer("mine", Mine)\ndef f(config, named, lr):\n'
            "    import torch\n    class Counting(torch.optim.SGD):\n        def step(self, closure=None):\n"
            "            self.param_groups[0]['k'] = self.param_groups[0].get('k', 0) + 1\n"
            "    return Counting(named, lr=lr)",
            "optim=mine",
            "changes its param_groups as it steps",
        ),
    ],
)
def test_a_part_that_makes_something_else_is_told_before_anything_is_trained(parts, source, chosen, message):
    (parts / "mine.py").write_text(HEAD + source)
    with pytest.raises(PartError, match=message):
        check_parts(composed("plugins=[mine]", chosen))


REWARD = CONFIG.replace("Task", "Reward")


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("source", "chosen", "message"),
    [
        ('@loss("mine")\ndef f(*_): 1 / 0', "algo.loss=mine", "fails on a trial of 4 rows: ZeroDivisionError"),
        (f'{REWARD}reward("mine", Mine, make="nowhere:f")', "reward=mine", "its maker nowhere:f cannot be imported"),
        ("", "task=jsonl task.path=none_such.jsonl", r"task\.path: cannot read none_such\.jsonl"),
    ],
)
def test_what_is_wrong_is_told_before_room_is_made_for_a_run(parts, source, chosen, message, resume):
    (parts / "mine.py").write_text(HEAD + source)
    kept = {
        "metrics.jsonl": '{"step": 1}\n',
        "samples.jsonl": "",
        "journal/trainer.jsonl": "",
        "summary.json": '{"status": "failed"}',
    }
    for name, text in kept.items():
        (parts / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (parts / "run" / name).write_text(text)
    config = composed("plugins=[mine]" if source else "plugins=[]", "experiment=smoke", *chosen.split())
    with pytest.raises(ValueError, match=message):
        run(config, parts / "run", resume=resume)
    there = {str(path.relative_to(parts / "run")) for path in (parts / "run").rglob("*") if path.is_file()}
    assert there - {"status.json"} == kept.keys()
    assert all((parts / "run" / name).read_text() == text for name, text in kept.items())


def test_what_a_logger_says_that_it_writes_is_listed(parts):
    sys.path.append(str(ROOT))
    config = composed("plugins=[examples.own_parts]", "logger=[console,jsonl,best]")
    assert dict(files(config))["best.txt"] == "the highest value of a metric"
    imports = "from rlhf.config import LoggerConfig\nfrom rlhf.plugins import logger\n"
    own = CONFIG.replace("Task", "Logger") + "@logger('mine', Mine, writes=['a.txt'])\ndef f(config, given): ..."
    (parts / "mine.py").write_text(HEAD + imports + own)
    with pytest.raises(PartError, match=r"mine:f registers logger=mine: writes must be like .* \(got \['a\.txt'\]\)"):
        prepare(["plugins=[mine]"])


def test_a_task_that_makes_no_task_is_told(parts):
    (parts / "mine.py").write_text(f'{HEAD}{CONFIG}@task("mine", Mine){MAKER}')
    with pytest.raises(ValueError, match=r"^task=mine: its maker must return a RawTask \(got NoneType\)$"):
        read_task(composed("plugins=[mine]", "task=mine").task, 0)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        pytest.param("None", "must return a function of prompts and answers", marks=pytest.mark.slow),
        ("lambda prompts, answers: 1 / 0", r"reward\.parts\.a=mine \(mine:f\) fails on a trial of one row: ZeroDiv"),
        pytest.param(
            "lambda prompts, answers: [1, 2]",
            r"reward=mine must return a list of 1 numbers or None \(got 2 values\)",
            marks=pytest.mark.slow,
        ),
        ("lambda prompts, answers: ['good']", r"reward=mine must return finite numbers or None \(got 'good'\)"),
    ],
)
def test_a_reward_that_rewards_nothing_is_told(parts, made, message):
    mine = CONFIG.replace("Task", "Reward") + f'@reward("mine", Mine)\ndef f(config, given):\n    return {made}\n'
    (parts / "mine.py").write_text(HEAD + mine)
    run = composed("plugins=[mine]", "reward=sum", "reward.parts={a: {kind: mine, size: 3}}")
    raw = read_task(run.task, 0)
    task = make_task(raw, make_tokenizer(run.model, raw.characters(), False, []))
    check_reward(run.reward, task)
    with pytest.raises(ValueError, match=message):
        given_rewards(run.reward, task, run.model)


def test_a_reward_s_nan_leaves_the_sample_out_and_is_counted(parts):
    kept = OwnReward("reward=mine", lambda prompts, answers: torch.tensor([0.5, float("nan")]))
    assert kept([Prompt("a", (1,))] * 2, ["b", "c"]) == [0.5, None] and kept.report.counts == {"not_finite": 1}


def test_samples_for_which_a_reward_raises_have_none_and_are_counted(parts):
    halved = OwnReward("reward=mine", lambda prompts, answers: [1 / len(answer) for answer in answers])
    assert halved([Prompt("a", (1,))] * 3, ["bb", "", "c"]) == [0.5, None, 1.0]
    assert (halved.report.errors, halved.report.error) == (1, "reward=mine raised ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("1 / 0", r"task=mine \(mine:make\) cannot be made: ZeroDivisionError: division by zero"),
        ("RawTask([], [ROW], GOLD)", r"must have rows in train, each a Row of rlhf\.tasks \(got none\)"),
        pytest.param(
            "RawTask([ROW], ['a'], GOLD)",
            r"must have rows in held_out, each a Row of rlhf\.tasks \(got str\)",
            marks=pytest.mark.slow,
        ),
        ("RawTask([ROW], [ROW], GOLD, Replies(3, None, '', ''))", "says most_answers=1, and its conversations have 3"),
    ],
)
def test_a_task_whose_maker_fails_or_whose_rows_are_none_is_told_in_one_line(parts, made, message):
    imports = (
        "from rlhf.tasks import RawTask, Replies, Row\nROW, GOLD = Row('a?', {}, None), lambda columns, answer: 1.0\n"
    )
    mine = f'{CONFIG}@task("mine", Mine)\ndef make(config, seed):\n    return {made}\n'
    (parts / "mine.py").write_text(HEAD + imports + mine)
    with pytest.raises(ValueError, match=message) as raised:
        read_task(composed("plugins=[mine]", "task=mine").task, 0)
    assert "\n" not in str(raised.value)


def test_a_reply_that_raises_says_whose_it_is(parts):
    (parts / "mine.py").write_text(
        f"{HEAD}from rlhf.config import EnvironmentConfig\nfrom rlhf.plugins import environment\n"
        "from rlhf.tasks import Replies\n"
        + CONFIG.replace("Task", "Environment").replace("    size: int = 1\n", "    turns: int = 2\n")
        + '@environment("mine", Mine)\ndef f(config): return Replies(2, lambda columns, said: said[7], "?", "?")\n'
    )
    raw = read_task(composed("plugins=[mine]", "task/environment=mine", "reward=verifier").task, 0)
    said = r"^task/environment=mine \(mine:f\): its reply fails on \['no'\]: IndexError: list index out of range$"
    with pytest.raises(PartError, match=said):
        raw.replies.reply({}, ["no"])


def test_whoever_decorates_a_function_registers_it_wherever_it_is_from(parts):
    (parts / "mine.py").write_text(f"{HEAD}import json\n{CONFIG}task('mine', Mine)(json.loads)\n")
    assert composed("plugins=[mine]", "task=mine").task.size == 1


def test_a_part_never_takes_the_place_of_a_choice_of_ours_that_has_no_file(parts):
    (parts / "mine.py").write_text(HEAD + OWN_ALGO.replace('"mine"', '"base"'))
    with pytest.raises(PartError, match="mine:f registers algo=base, which conf/ has: give it another name"):
        composed("plugins=[mine]", "algo=grpo")


def test_algorithms_of_packages_are_swept_before_they_are_loaded(parts):
    installed(parts / "site", "acme", HEAD + OWN_ALGO, losses="mine = acme:f")
    prepare([])
    assert not unknown_choices(["algo=grpo,mine"])


def test_a_loss_with_dials_of_its_own_is_an_algorithm(parts):
    (parts / "mine.py").write_text(HEAD + OWN_ALGO)
    algo = composed("plugins=[mine]", "algo=mine", "algo.tau=3").rl
    assert (algo.name, algo.loss, algo.advantage, algo.tau) == ("mine", "mine", "group_mean", 3.0)
    with pytest.raises(CompactHydraException, match=r"algo\.tau must be greater than 0 \(got 0\.0\)"):
        composed("plugins=[mine]", "algo=mine", "algo.tau=0")
    with pytest.raises(CompactHydraException, match=r"algo\.loss=mine has dials of its own: choose algo=mine"):
        composed("plugins=[mine]", "algo=grpo", "algo.loss=mine")


def test_files_on_the_search_path_build_on_parts_of_one_s_own_and_experiments_name_their_modules(parts):
    (parts / "mine.py").write_text(HEAD + CONFIG + f'@task("mine", Mine){MAKER}')
    for name, told in {
        "task/large": {"defaults": ["/schema/task/mine@_here_", "_self_"], "size": 9},
        "experiment/all": {"defaults": [{"override /task": "large"}, "_self_"], "plugins": ["mine"]},
    }.items():
        (parts / "my" / name).parent.mkdir(parents=True, exist_ok=True)
        (parts / "my" / f"{name}.yaml").write_text("# @package _global_\n" * ("exp" in name) + yaml.safe_dump(told))
    run = composed("--config-dir", "my", "experiment=all")
    assert (run.task.size, run.plugins) == (9, ["mine"])


def test_a_package_is_imported_when_one_of_its_parts_is_chosen_and_a_broken_one_costs_nobody_else(parts, capsys):
    installed(parts / "site", "acme", f'{HEAD}{CONFIG}@task("mine", Mine){MAKER}', tasks="mine = acme:make")
    installed(parts / "site", "broken", "import nowhere", tasks="bad = broken:make", losses="bad = broken:loss")
    assert composed("task=sort").algo.loss == "clip"
    assert {"mine", "bad"} < set(registry.names("task")) and "bad" in registry.names("loss")
    assert not {"acme", "broken"} & set(sys.modules)
    assert composed("task=mine", "task.size=4").task.size == 4
    said = r"the entry point broken:\w+ of the package broken cannot be imported: ModuleNotFoundError: No module named"
    for chosen in ("task=bad", "algo.loss=bad"):
        with pytest.raises(HydraException, match=rf"^{chosen}: {said}"):
            composed(chosen)
    assert not capsys.readouterr().err


def test_packages_whose_names_are_taken_are_told(parts, capsys):
    installed(parts / "site", "acme", HEAD, tasks="sort = acme:make\ntwice = acme:make", losses="no = acme:dataclass")
    composed("task=sort")
    said = capsys.readouterr().err
    assert said.startswith("warning: task=sort of the package acme is left out, as there is one already: its entry")
    (parts / "mine.py").write_text(f'{HEAD}{CONFIG}@task("twice", Mine){MAKER}')
    with pytest.raises(PartError, match="mine:make registers task=twice, which the package acme has: give it another"):
        prepare(["plugins=[mine]"])
    installed(parts / "site", "other", HEAD, tasks="twice = other:make")
    with pytest.raises(HydraException, match="task=twice is registered by the package acme and the package other"):
        composed("task=twice")
    with pytest.raises(HydraException, match=r'registers no such part: decorate its maker with @loss\("no", \.\.\.\)'):
        composed("algo.loss=no")


def test_help_lists_parts_of_one_s_own_and_imports_nothing_heavy(rlhf_train, tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules |= dict.fromkeys(['torch', 'numpy', 'ray'])\n")
    done = rlhf_train(
        "--help", "plugins=[examples.own_parts]", "task=count", env={"PYTHONPATH": f"{folder}:{ROOT}", FRESH: "1"}
    )
    assert done.returncode == 0, done.stderr
    lines = {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines()) if len(words) > 1}
    assert "count" in lines["task"] and lines["task/environment"] == ["try_again"] and "best" in lines["logger"]
    assert "asymmetric" in lines["algo.loss"] and "best_half" in lines["algo.advantage"] and "sgd" in lines["optim"]
    assert "  most: 9\n" in done.stdout


# --- in a sweep -------------------------------------------------------------------------------------------------------


def two_modules(folder):
    """`mine` and `other`, both with a task=mine, whose dials and algorithms are not the same."""
    (folder / "mine.py").write_text(f'{HEAD}{CONFIG}@task("mine", Mine){MAKER}{OWN_ALGO.replace("Mine", "Algo")}')
    (folder / "other.py").write_text(f'{HEAD}{CONFIG.replace("size", "number")}@task("mine", Mine){MAKER}')


def jobs(*overrides):
    """The runs of a sweep, as its launcher composes them."""
    prepare(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        master = GlobalHydra.instance().config_loader().load_configuration("config", list(overrides), RunMode.MULTIRUN)
        Callbacks(master).on_multirun_start(config=master, config_name="config")
        (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(overrides)), None)
        loader = GlobalHydra.instance().config_loader()
        for job in batch:
            config = loader.load_sweep_config(master, list(job))
            with open_dict(config):
                del config["hydra"]
            yield checked(config)


@pytest.mark.slow
def test_modules_of_different_jobs_of_a_sweep_may_have_parts_of_the_same_name(parts):
    two_modules(parts)
    found = [(type(job.task).__module__, job.seed) for job in jobs("plugins=[mine],[other]", "task=mine", "seed=0,1")]
    assert found == [("mine", 0), ("mine", 1), ("other", 0), ("other", 1)]


def test_each_job_of_such_a_sweep_has_the_dials_of_its_own_part(parts):
    two_modules(parts)
    own, others = jobs("plugins=[other],[mine]", "task=mine")
    assert (own.task.number, others.task.size) == (1, 1) and not hasattr(others.task, "number")
    with pytest.raises(HydraException, match=r"Could not override 'task\.number'"):
        list(jobs("plugins=[other],[mine]", "task=mine", "task.number=3,4"))


def test_modules_of_experiments_that_are_swept_may_have_parts_of_the_same_name(parts):
    two_modules(parts)
    where = ("plugins=[]", "experiment=one,two")
    for name, module in (("one", "mine"), ("two", "other")):
        (parts / "experiment").mkdir(exist_ok=True)
        (parts / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\nplugins: [{module}]\n")
    assert wanted(where[1:], [CONF, parts]) == [["mine"], ["other"]]
    assert wanted(["plugins=[a],[b,c]", *where[1:]], [parts]) == [
        *(["a", "mine"], ["a", "other"]),
        *(["b", "c", "mine"], ["b", "c", "other"]),
    ]
    assert wanted(["plugins=[a]", "plugins=[b]"], []) == [["b"]] and wanted([], []) == [[]]


def test_a_module_that_others_of_a_sweep_import_is_there_for_each(parts):
    two_modules(parts)
    (parts / "mine.py").write_text((parts / "mine.py").read_text() + "\nimport acme\n")
    (parts / "acme.py").write_text(f'{HEAD}\n@loss("third"){MAKER}')
    found = [job.algo.loss for job in jobs("plugins=[mine],[acme],[acme,other]", "algo.loss=third")]
    assert found == ["third"] * 3


def test_two_modules_of_one_run_with_parts_of_the_same_name_are_refused(parts):
    two_modules(parts)
    for _ in range(2):  # also when both are imported
        with pytest.raises(PartError, match="other:make registers task=mine, which mine:make has: give it another"):
            prepare(["plugins=[mine,other]"])
        prepare(["plugins=[other]"])


# --- from another folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def begun(parts):
    """A run's folder, as Hydra has noted it, that was started in `there/` with `there/mine.py`; we are in `here/`."""
    there, here, hydra = parts / "there", parts / "here", parts / "run" / ".hydra"
    for folder in (there, here, hydra):
        folder.mkdir(parents=True)
    (there / "mine.py").write_text(f'{HEAD}{CONFIG}@task("mine", Mine){MAKER}')
    os.chdir(there)
    overrides = ["plugins=[mine]", "task=mine"]
    config, choices = resume._compose(overrides)
    told = {"hydra": {"runtime": {"choices": choices, "cwd": str(there), "config_sources": []}}}
    for name, node in {"config": config, "hydra": told, "overrides": overrides}.items():
        (hydra / f"{name}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(node)))
    os.chdir(here)
    forgotten()
    sys.path[:] = [each for each in sys.path if each != str(there)]
    return parts / "run"


def forgotten():
    """As in a new process."""
    for name in _of_tests():
        del sys.modules[name]
    for key in [key for key, part in registry._parts.items() if part.where.startswith("mine")]:
        del registry._parts[key]
    invalidate_caches()


def test_a_resume_finds_modules_where_the_run_was_started(begun, capsys):
    config, _ = resume.composed(begun, [])
    assert sys.modules["mine"].__file__ == str(begun.parent / "there" / "mine.py") and config.task.size == 1
    assert "warning" not in capsys.readouterr().err


def test_a_resume_takes_a_module_of_the_current_folder_first_and_says_so(begun, capsys):
    (begun.parent / "here" / "mine.py").write_text((begun.parent / "there" / "mine.py").read_text())
    resume.composed(begun, [])
    here, there = (str(begun.parent / folder / "mine.py") for folder in ("here", "there"))
    assert sys.modules["mine"].__file__ == here
    assert capsys.readouterr().err == f"warning: mine is {here}, not {there}, where the run was started\n"


def test_a_module_that_a_resume_has_added_is_found_by_the_next_one(begun):
    (begun.parent / "here" / "other.py").write_text(f'{HEAD}\n@loss("other"){MAKER}')
    resume.composed(begun, ["plugins=[mine,other]"])
    forgotten()
    sys.path[:] = [each for each in sys.path if not each.startswith(str(begun.parent))]
    os.chdir(begun)
    assert resume.composed(begun, [])[0].plugins == ["mine", "other"]


def test_a_folder_that_is_gone_is_named_where_its_module_is_not_found(begun):
    shutil.rmtree(begun.parent / "there")
    said = (
        rf"^plugins: mine cannot be imported, .* \({begun.parent}/there, which is no folder any more\): start this in"
    )
    with pytest.raises(PartError, match=said) as raised:
        resume.composed(begun, [])
    assert "\n" not in str(raised.value) and "ModuleNotFoundError" in str(raised.value)


def test_an_evaluation_looks_where_the_run_of_its_policy_was_started(tmp_path):
    for name in ("a run", "b"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / "policy").mkdir()
        (tmp_path / name / ".hydra" / "hydra.yaml").write_text(f"hydra: {{runtime: {{cwd: /started/{name}}}}}")
    (tmp_path / "c").mkdir()
    named = f"model.path='{tmp_path}/a run/policy',{tmp_path}/b/checkpoints/1/policy,{tmp_path}/c,gpt2"
    found = [each for hydra in runs_of(["task=sort", named]) for each in started_in(hydra)]
    assert found == ["/started/a run", "/started/b"]
    (tmp_path / "b" / ".hydra" / "hydra.yaml").write_text("[")
    assert started_in(tmp_path / "b" / ".hydra" / "hydra.yaml") == []


# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def acme(tmp_path):
    """The environment of a process in which the example is an installed package."""
    wheel, info = tmp_path / "acme_parts-1.0-py3-none-any.whl", "acme_parts-1.0.dist-info"
    groups = "\n".join(f"[rlhf.{kind}]\n{named}\n" for kind, named in OFFERED.items())
    files = {
        "acme_parts.py": EXAMPLE.read_text(),
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": groups,
    }
    with zipfile.ZipFile(wheel, "w") as written:
        for name, text in (files | {f"{info}/RECORD": "".join(f"{file},,\n" for file in files)}).items():
            written.writestr(name, text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(tmp_path / "site"), str(wheel)], check=True, timeout=100)
    return {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", FRESH: "1"}


def python(module: str, *arguments: str, folder: Path, variables) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"rlhf.{module}", *arguments]
    options = {"cwd": folder, "env": os.environ | variables, "capture_output": True, "text": True, "timeout": 110}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def steps_in(run: Path) -> list[str]:
    """The lines of a run's steps."""
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"train/reward"' in line]


SMALL = ("experiment=smoke", "sft.steps=5", "checkpoint.every=1")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_installed_package_s_parts_train_go_on_and_leave_a_policy_that_is_evaluated(acme, tmp_path):
    shown = python("train", "--help", folder=tmp_path, variables=acme).stdout
    assert all(f" {name}" in shown for name in (each.partition(" ")[0] for each in OFFERED.values()))
    run = tmp_path / "run"
    python("train", *SMALL, *ALL, "steps=2", f"hydra.run.dir={run}", folder=tmp_path, variables=acme)
    assert (run / "best.txt").read_text().endswith(" in step 0\n")
    assert yaml.safe_load((run / ".hydra" / "config.yaml").read_text())["task"]["most"] == 9
    before = steps_in(run)
    python("resume", str(run), "steps=3", folder=tmp_path, variables=acme)
    assert read_summary(run)["status"] == "finished"
    assert len(before) == 2 and len(steps_in(run)) == 3 and steps_in(run)[:2] == before, "with the times that they took"
    evaluated = python(
        "evaluate",
        *(f"model.path={run / 'policy'}", "task=count", "evaluate.samples=1", "evaluate.k=[1]"),
        folder=tmp_path,
        variables=acme,
    )
    assert "on count: 8 held-out prompts" in evaluated.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sweeps_and_checks_take_parts_of_a_file_in_the_working_folder(tmp_path):
    (tmp_path / "mine.py").write_text(EXAMPLE.read_text())
    named, variables = ("plugins=[mine]", "transfer=local", "steps=1"), {"PYTHONPATH": str(ROOT), FRESH: "1"}
    checks = python("train", *SMALL, *named, *ALL, "mode=check", folder=tmp_path, variables=variables)
    assert "all is well" in checks.stdout
    sweep = ("task=count,sort", f"hydra.sweep.dir={tmp_path / 'sweep'}", "optim=sgd", "algo.loss=asymmetric")
    python("train", "-m", *SMALL, *named, *sweep, folder=tmp_path, variables=variables)
    jobs = [tmp_path / "sweep" / number for number in ("0", "1")]
    assert [(is_run(job), read_summary(job)["status"]) for job in jobs] == [(True, "finished")] * 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_compares_two_modules_with_parts_of_the_same_names(tmp_path):
    for name, most in (("mine", 5), ("other", 7)):
        source = EXAMPLE.read_text()
        assert "most: int = 9" in source
        (tmp_path / f"{name}.py").write_text(source.replace("most: int = 9", f"most: int = {most}"))
    sweep = ("plugins=[mine],[other]", "task=count", "reward=verifier", "algo.loss=asymmetric", "transfer=local")
    said = {"folder": tmp_path, "variables": {"PYTHONPATH": str(ROOT), FRESH: "1"}}
    python("train", "-m", *SMALL, *sweep, "steps=1", f"hydra.sweep.dir={tmp_path / 'sweep'}", **said)
    most = {}
    for job in (tmp_path / "sweep" / "0", tmp_path / "sweep" / "1"):
        assert read_summary(job)["status"] == "finished", read_summary(job)
        config = yaml.safe_load((job / ".hydra" / "config.yaml").read_text())
        most[config["plugins"][0]] = config["task"]["most"]
    assert most == {"mine": 5, "other": 7}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_with_modules_of_its_own_is_resumed_evaluated_and_reported_from_elsewhere(tmp_path):
    there, here, run = tmp_path / "there", tmp_path / "here", tmp_path / "run"
    there.mkdir()
    here.mkdir()
    (there / "mine.py").write_text(EXAMPLE.read_text())
    (there / "graded.py").write_text(
        "def length(prompts, completions, **columns): return [len(c) for c in completions]"
    )
    named, variables = ("plugins=[mine]", "task=count"), {"PYTHONPATH": str(ROOT), FRESH: "1"}
    own = (*named, "algo.loss=asymmetric", "optim=sgd", "reward=function", "reward.function=graded:length")
    python("train", *SMALL, *own, "steps=1", f"hydra.run.dir={run}", folder=there, variables=variables)
    python("resume", str(run), "steps=2", folder=here, variables=variables)
    assert len(steps_in(run)) == 2
    small = ("evaluate.samples=1", "evaluate.k=[1]")
    python("evaluate", f"model.path={run / 'policy'}", *named, *small, folder=here, variables=variables)
    python("report", str(run), folder=here, variables=variables)
    assert (run / "report.html").is_file()
    there.rename(tmp_path / "gone")
    command = [sys.executable, "-m", "rlhf.resume", str(run), "steps=3"]
    options = {"cwd": here, "env": os.environ | variables, "capture_output": True, "text": True, "timeout": 110}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 1 and f"({there}, which is no folder any more; {here})" in done.stderr
    assert "Traceback" not in done.stderr

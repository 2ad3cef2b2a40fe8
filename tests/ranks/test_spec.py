"""What another rank is started with is the first one's configuration, part for part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.compose import CONF
from rlhf.ranks.place import Invitation, Place
from rlhf.ranks.spec import of_spec, spec_of

ROOT = Path(__file__).resolve().parents[2]
PLACE = Place(2, 4, 2, Invitation("127.0.0.1", 4711, "key"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
NEEDED = {"checkpoint": ["model.path=somewhere"]}
OTHERS = [
    "algo=ppo transfer=disk transfer/sender=ray rollout.workers=2",
    "algo=dpo transfer=ipc transfer.staging=live transfer.take=view",
    "model.dtype=bfloat16 model.lora.rank=4 model.lora.target=[q_proj,v_proj] transfer=gloo logger=[]",
    "rollout=vllm transfer.take=copy transfer.sender.start_timeout_s=1e300 alarms.kl=null",
    "reward=sum reward.parts={right:{kind:verifier},short:{kind:function,function:examples.reward_functions:brevity}}",
    "task=jsonl task.path=examples/preferences.jsonl profile.steps=[1,2]",
]


def round_trip(config, folder: Path, resume: bool = False):
    line = spec_of(config, folder, PLACE, resume)
    assert "\n" not in line, "it is read as a line"
    return of_spec(line)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_comes_back_as_it_was(compose_run, experiment):
    config = compose_run(f"experiment={experiment}", "trainer=replicas", *NEEDED.get(experiment, []))
    came, folder, place, resume = round_trip(config, Path("/a folder/\u00e9"), resume=True)
    assert came == config and type(came.trainer) is type(config.trainer)
    assert (folder, place, resume) == (Path("/a folder/\u00e9"), PLACE, True)


@pytest.mark.parametrize("overrides", OTHERS, ids=lambda words: words.partition(" ")[0])
def test_other_parts_come_back_as_they_were(compose_run, monkeypatch, overrides):
    monkeypatch.chdir(ROOT)
    config = compose_run("experiment=smoke", *overrides.split())
    assert round_trip(config, Path("run"))[0] == config


PLUG_IN = """
import sys
from pathlib import Path
from rlhf.compose import CONF, checked, prepare
from rlhf.ranks.place import Invitation, Place
from rlhf.ranks.spec import spec_of
from rlhf.shell.search_path import of_command
from hydra import initialize_config_dir

where, words = of_command(sys.argv[1:])
prepare(words, where)
with initialize_config_dir(str(CONF), version_base="1.3"):
    config = checked(where.compose("config", words))
print(type(config.reward).__module__)
print(spec_of(config, Path("run"), Place(1, 2, 1, Invitation("127.0.0.1", 1, "key")), False))
"""
HEARD = """
import sys
from rlhf.plugins.found import use
from rlhf.ranks.spec import of_spec

config, folder, *_ = of_spec(sys.stdin.readline())
use(config.plugins)
print(type(config.reward).__module__, config.reward.longest, config.rl.loss, folder)
"""


def test_parts_of_a_plug_in_come_back_as_its_own_classes_in_another_process():
    words = ("plugins=[examples.own_parts]", "reward=short", "reward.longest=3", "optim=sgd", "algo.loss=asymmetric")
    told = python(PLUG_IN, "", "experiment=smoke", "task=count", *words).splitlines()
    assert told[0] == "examples.own_parts"
    assert python(HEARD, told[1]) == f"examples.own_parts 3 asymmetric {ROOT / 'run'}\n"


def python(code: str, said: str, *words: str) -> str:
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, input=said, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""Programs of users, a process a row: what they ask is learned from, and what befalls them is no reward of 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.agents.environment import AgentEnvironment
from rlhf.config.task import AgentTaskConfig
from rlhf.episodes.loop import conversing
from rlhf.shell.ending import RunError

TALKS = """
messages = row["prompt"]
for turn in range(row.get("turns", 1)):
    said = ask(messages)
    messages += [said, {"role": "user", "content": f"{turn}?"}]
reward(row.get("worth", 0.25))
"""


def gone(pid: int, within_s: float = 20.0) -> bool:
    """Whether a process has ended, at the latest by then; a zombie has."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_what_programs_ask_is_rows_with_their_rewards(agents, prompt, tokenizer):
    prompts = [prompt("a", turns=1, worth=0.5), prompt("b", turns=3, worth=1)]
    rollouts = agents(TALKS).sample(prompts, n=2, temperature=0.7, seed=3)
    assert [told.score for told in rollouts.episodes] == [0.5, 0.5, 1.0, 1.0]
    assert [len(said) for said in rollouts.conversations] == [1, 1, 5, 5]
    assert rollouts.conversations[3][1::2] == ["0?", "1?"]
    assert all(row.prompt is None and not row.earlier for row in rollouts.completions), "as the data have it"
    assert all(row.logprobs is not None and len(row.logprobs) == len(row.ids) for row in rollouts.completions)
    assert rollouts.texts == [said[-1] for said in rollouts.conversations]
    assert rollouts.episodes[2].counts == {"agent/calls": 3.0, "tools/malformed": 0.0}
    again = agents(TALKS, concurrency=1).sample(prompts, n=2, temperature=0.7, seed=3)
    assert again.conversations == rollouts.conversations, "what is said depends on seeds alone"
    other = agents(TALKS).sample(prompts, n=2, temperature=0.7, seed=4)
    assert other.conversations != rollouts.conversations


def test_a_program_that_asks_for_something_else_has_a_prompt_of_its_own_and_earlier_rows(agents, prompt):
    code = """
ask([{"role": "system", "content": "one"}, *row["prompt"]])
ask([{"role": "system", "content": "two"}, *row["prompt"]])
reward(1.0)
"""
    rollouts = agents(code).sample([prompt("a")], n=2, temperature=0.7, seed=3)
    for row in rollouts.completions:
        assert row.prompt is not None and len(row.earlier) == 1 and row.earlier[0].prompt != row.prompt
    assert rollouts.tokens == sum(len(r.ids) + len(r.earlier[0].ids) for r in rollouts.completions)


BEFALLS = """
kind = row["kind"]
if kind != "silent":
    ask(row["prompt"])
if kind == "raises":
    raise RuntimeError("what a day")
if kind in ("good", "silent"):
    reward(1)
if kind == "null":
    reward(None)
if kind == "late":
    time.sleep(600)
"""


def test_what_befalls_a_program_is_a_class_of_failure_and_never_a_reward(agents, prompt):
    kinds = ["good", "raises", "mute", "silent", "null"]
    rollouts = agents(BEFALLS).sample([prompt(kind, kind=kind) for kind in kinds], n=1, temperature=0.7, seed=3)
    told = rollouts.episodes
    assert [each.failed for each in told] == ["", "died", "garbage", "garbage", ""]
    assert [each.score for each in told] == [1.0, None, None, None, None]
    assert told[1].why == "it has ended with code 1: RuntimeError: what a day"
    assert "without a reward" in told[2].why and "no call" in told[3].why
    assert rollouts.completions[3].mask.tolist() == [0], "a row without an answer"


@pytest.mark.slow
def test_a_program_without_a_reward_at_its_deadline_is_killed(agents, prompt):
    started = time.monotonic()
    rollouts = agents(BEFALLS, timeout_s=5.0).sample([prompt("x", kind="late")], n=1, temperature=0.7, seed=3)
    assert rollouts.episodes[0].failed == "timed_out" and "task.timeout_s" in rollouts.episodes[0].why
    assert 5 <= time.monotonic() - started < 60


def test_a_step_in_which_no_program_comes_to_an_answer_says_why(agents, prompt):
    with pytest.raises(RunError, match=r"no agent has come to a first answer: died: it has ended with code 7: oh$"):
        agents("print('oh'); sys.exit(7)").sample([prompt("x")], n=2, temperature=0.7, seed=3)


def test_what_a_program_has_started_ends_with_it(agents, prompt, tmp_path):
    code = f"""
child = subprocess.Popen(["sleep", "600"])
with open({str(tmp_path / "children")!r}, "a") as file:
    file.write(f"{{child.pid}}\\n")
ask(row["prompt"])
reward(1)
"""
    agents(code).sample([prompt("x")], n=2, temperature=0.7, seed=3)
    children = [int(line) for line in (tmp_path / "children").read_text().split()]
    assert len(children) == 2 and all(gone(child) for child in children)


def test_so_many_run_at_once(agents, prompt, tmp_path):
    code = f"""
with open({str(tmp_path / "times")!r}, "a") as file:
    file.write(f"{{time.monotonic()}} 1\\n")
ask(row["prompt"])
with open({str(tmp_path / "times")!r}, "a") as file:
    file.write(f"{{time.monotonic()}} -1\\n")
reward(1)
"""
    agents(code, concurrency=2).sample([prompt("x")], n=6, temperature=0.7, seed=3)
    changes = sorted(tuple(map(float, line.split())) for line in (tmp_path / "times").read_text().splitlines())
    running = [sum(change for _, change in changes[: end + 1]) for end in range(len(changes))]
    assert len(changes) == 12 and max(running) <= 2


def test_a_long_row_comes_as_a_file(agents, prompt):
    code = "ask([{'role': 'user', 'content': 'x'}]); reward(len(row['long']) if given[0] == '@' else 0)"
    rollouts = agents(code).sample([prompt("x", long="é" * 40_000)], n=1, temperature=0.7, seed=3)
    assert rollouts.episodes[0].score == 40_000


KILLED = """
import sys, time
from pathlib import Path
from rlhf.agents.process import AgentProcess, Guard

with Guard() as guard:
    AgentProcess([sys.executable, "-S", "-c", "import time; print(1); time.sleep(600)"], {}, Path(sys.argv[1]), guard)
    agent = AgentProcess(["sleep", "600"], {}, Path(sys.argv[1]), guard)
    print(agent._process.pid, flush=True)
    time.sleep(600)
"""


def test_a_run_that_is_killed_leaves_no_program(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "log")], stdout=subprocess.PIPE, start_new_session=True
    ) as run:
        assert run.stdout is not None
        agent = int(run.stdout.readline())
        os.kill(run.pid, signal.SIGKILL)
    assert gone(agent)


OPENAI = """
import json, os, openai, requests

client, row = openai.OpenAI(), json.loads(os.environ["RLHF_ROW"])
said = client.chat.completions.create(model="policy", messages=row["prompt"]).choices[0].message
client.chat.completions.create(model="policy", messages=[*row["prompt"], said, {"role": "user", "content": "!"}])
headers = {"Authorization": "Bearer " + client.api_key}
requests.post(os.environ["RLHF_SESSION"] + "/reward", json={"reward": 1}, headers=headers).raise_for_status()
"""


@pytest.mark.slow
def test_the_package_openai_needs_nothing_but_its_environment(client, tokenizer, prompt, tmp_path):
    (tmp_path / "agent.py").write_text(OPENAI)
    config = AgentTaskConfig(path="rows.jsonl", command=f"python {tmp_path / 'agent.py'}")
    agents = conversing(client, AgentEnvironment(config, tokenizer))
    (told,) = agents.sample([prompt("x")], n=1, temperature=0.7, seed=3).episodes
    assert told.score == 1.0 and len(told.said) == 3 and told.said[1] == "!"

"""The dials: every choice composes, files and schemas agree, and a mistake is answered with what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from forked import LIGHT
from hydra.errors import CompactHydraException

from rlhf.compose import CONF, misplaced, schemas
from rlhf.config import all_logprobs, needs_logprobs
from rlhf.rollout.spec_of_run import _engine
from transfer.config import Take

NEEDS = {
    "task=jsonl": "task.path=rows.jsonl",
    "task=hf": "task.path=rows.parquet",
    "task=reasoning_gym": "task.name=chain_sum",
    "model=hf": "model.path=a/checkpoint",
    "reward=function": "reward.function=package.module:name",
    "reward=http": "reward.url=http://127.0.0.1:8000/score",
    "reward=sum": "reward.parts={right: {kind: verifier}}",
}

WITH = {choice: (needed,) for choice, needed in NEEDS.items()} | {  # what it does not go with is the default
    "task=guess": ("reward=verifier",),
    "task=agent": ("task.command='python -V'", "task.path=rows.jsonl", "reward=verifier"),
    "task=environment": ("task.factory=package.module:Class", "task.path=rows.jsonl", "reward=verifier"),
    "reward=judge": ("reward.url=http://127.0.0.1:8000/v1/chat/completions", "reward.model=judge"),
    "rollout=vllm": ("transfer.take=copy",),
    "trainer=sharded": ("transfer.take=copy",),
    "transfer=handles": ("rollout=vllm", "transfer.sender.url=[http://127.0.0.1:8000]"),
}


SCHEMAS = {group: choices for group, choices in schemas().items() if group != "task/environment"}  # all are others'


def files(group: str) -> list[Path]:
    return sorted((CONF / group).glob("*.yaml"))


def schema_of(file: Path) -> tuple[str, str]:
    """(group, name) of the schema that a file of a config group builds on."""
    first = yaml.safe_load(file.read_text())["defaults"][0]
    group, _, name = first.partition("@")[0].removeprefix("/schema/").rpartition("/")
    return group, name


def sum_of(parts: str) -> list[str]:
    return ["reward=sum", f"reward.parts={parts}"]


CHOICES = [(group, file.stem) for group in SCHEMAS for file in files(group)]
EXPERIMENTS = [file.stem for file in files("experiment")]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_into_its_schema(compose_run, group, name):
    choice = f"{group}={name}"
    run = compose_run(choice, *WITH.get(choice, ()))
    part = run
    for attribute in group.split("/"):
        part = getattr(part, attribute)
    expected = SCHEMAS[group][schema_of(CONF / group / f"{name}.yaml")[1]]
    assert type(part[name] if group == "logger" else part) is expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(compose_run, name):
    needed = NEEDS["model=hf"] if "/model: hf" in (CONF / "experiment" / f"{name}.yaml").read_text() else "steps=2"
    assert compose_run(f"experiment={name}", needed).steps >= 1


@pytest.mark.parametrize("choice", NEEDS)
def test_a_required_key_without_a_value_is_asked_for_by_name(compose_run, choice):
    key = NEEDS[choice].partition("=")[0]
    with pytest.raises(CompactHydraException, match=rf"{key} has no value: add {key}="):
        compose_run(choice)


def test_every_file_builds_on_a_schema_of_its_group_and_every_schema_has_a_file():
    used = {schema_of(CONF / group / f"{name}.yaml") for group, name in CHOICES}
    assert used == {(group, name) for group, schemas in SCHEMAS.items() for name in schemas}
    assert all(schema_of(CONF / group / f"{name}.yaml")[0] == group for group, name in CHOICES)


def test_every_folder_of_files_is_a_group_that_the_code_knows():
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.glob("**/*.yaml")}
    assert folders == {".", "experiment", "hydra/callbacks", *SCHEMAS}


# --- mistakes on the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "screen"),
    [
        (
            "transfer=ncll",
            [
                "Could not find 'transfer/ncll'",
                "Available options in 'transfer'",
                "disk",
                "gloo",
                "ipc",
                "local",
                "nccl",
            ],
        ),
        ("+transfer.bucket_mb=512", ["'IpcConfig' object has no attribute 'bucket_mb'"]),
        pytest.param(
            "transfer.slots=two",
            ["Value 'two' of type 'str' could not be converted to Integer"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "model.dtype=fp8", ["Invalid value 'fp8', expected one of [float32, bfloat16]"], marks=pytest.mark.slow
        ),
        (
            "transfer=ipc transfer/sender=ray transfer.sender.url=[http://127.0.0.1:1]",
            ["that key belongs to the http sender", "transfer/sender=http"],
        ),
        pytest.param(
            "algo=grpo samples_per_prompt=1",
            ["grpo compares samples of one prompt: samples_per_prompt must be at least 2 (got 1)"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_is_on_the_screen_with_what_is_allowed(rlhf_train, arguments, screen):
    done = rlhf_train(*arguments.split(), env={LIGHT: "1"})
    assert done.returncode == 1
    for words in screen:
        assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo=rloo", "samples_per_prompt=1"], "rloo compares samples of one prompt"),
        (["algo=ppo", "steps=5"], r"algo\.critic_warmup_steps must be less than steps \(got 5 and 5\)"),
        (["updates_per_step=5", "prompts_per_step=4"], r"at most prompts_per_step \(4; got 5\)"),
        (["transfer=local", "rollout.workers=2"], r"rollout\.workers must be 1 \(got 2\)"),
        (["transfer=local", "rollout.dtype=bfloat16"], r"rollout\.dtype must be null \(got bfloat16\)"),
        (["transfer.sender.url=[http://127.0.0.1:1]"], "use transfer=disk"),
        (["transfer.sender.url=[127.0.0.1:1]"], r"must be like http://127\.0\.0\.1:8000 \(got '127\.0\.0\.1:1'\)"),
        (["transfer.slots=1"], r"transfer\.slots must be at least 2"),
        (
            ["transfer.staging=live", "rollout.in_flight=keep"],
            r"takes weights away before they change: .* rollout\.in_flight must be wait or abort \(got keep\)",
        ),
        (
            ["transfer.staging=live", "transfer.take=copy", "rollout.dtype=bfloat16"],
            r"rollout\.dtype must be null \(got bfloat16\); choose transfer\.staging=arena",
        ),
        (["transfer=local", "transfer.verify=full"], r"transfer\.verify must be off \(got full\)"),
        (["transfer.verify_every=-1"], r"transfer\.verify_every must be at least 0 \(got -1\)"),
        (["transfer.verify_tolerance=0"], r"transfer\.verify_tolerance must be greater than 0 \(got 0\.0\)"),
        (["rollout.logprobs=sample", "algo.correction=tis"], r"set rollout\.logprobs=auto"),
        (["rollout.logprobs=sample", "algo.kl_in=reward"], r"set rollout\.logprobs=auto"),
        (["rollout.restarts=-1"], r"rollout\.restarts must be at least 0 \(got -1\)"),
        (["rollout.mismatch_alarm=0"], r"rollout\.mismatch_alarm must be greater than 0"),
        (["transfer=disk", "transfer.keep=0"], r"transfer\.keep must be at least 1"),
        (["transfer=gloo", "transfer.bucket_mib=0"], r"transfer\.bucket_mib must be between 1 and 65536 \(got 0\)"),
        (["transfer=gloo", "transfer.host=0.0.0.0"], r"transfer\.host must be the one address .*\(got '0\.0\.0\.0'\)"),
        (["transfer=nccl", "model.device=cpu"], r"set model\.device=cuda \(got cpu\), or use transfer=gloo"),
        (["transfer.sender.timeout_s=0"], r"transfer\.sender\.timeout_s must be greater than 0 \(got 0\.0\)"),
        (["model.hidden=65"], r"model\.hidden must be a multiple of model\.heads \(got 65 and 4\)"),
        (["task.max_length=2"], r"task\.max_length must be at least 3 \(got 2\)"),
        (["task=arithmetic", "task.operators=/"], r"task\.operators must be made of '\+', '-' and '\*' \(got '/'\)"),
        (["reward=function", "reward.function=name"], r"must be like package\.module:name \(got 'name'\)"),
        (["reward.max_failed=2"], r"reward\.max_failed must be between 0\.0 and 1\.0 \(got 2\.0\)"),
        (["reward.centring=-1"], r"reward\.centring must be at least 0 \(got -1\.0\)"),
        (
            ["reward=http", "reward.url=host:80"],
            r"reward\.url must be like http://127\.0\.0\.1:8000/score \(got 'host:80'\)",
        ),
        (["reward=http", "reward.url=http://h:99999"], r"reward\.url must be like .*\(got 'http://h:99999'\)"),
        (["reward=http", "reward.url=http://me:secret@h"], r"^reward\.url must have no user and password in it"),
        (["reward=http", "reward.url=http://h", "reward.token_variable=sk-1"], r"not the token itself$"),
        (sum_of("{}"), r"reward\.parts must be like \{right: \{kind: verifier\}\} \(got \{\}\)"),
        (sum_of("3"), r"reward\.parts must be like .* \(got 3\)"),
        (sum_of("{a: verifier}"), r"reward\.parts\.a must be like \{kind: verifier, weight: 1\.0\} \(got 'verifier'\)"),
        (
            sum_of("{a: {kind: sum}}"),
            r"must be one of verifier, math, model, function, http, judge, given \(got 'sum'\)",
        ),
        (sum_of("{a: {kind: [verifier]}}"), r"reward\.parts\.a\.kind must be one of .* \(got \['verifier'\]\)"),
        (sum_of("{a/b: {kind: verifier}}"), r"a part's name must be letters, digits and _ \(got 'a/b'\)"),
        (sum_of("{a: {kind: verifier, weight: nan}}"), r"reward\.parts\.a\.weight must be a finite number \(got nan\)"),
        (sum_of("{a: {kind: verifier, wait: 1}}"), r"reward\.parts\.a\.wait is no key of verifier, which has weight"),
        (sum_of("{a: {kind: verifier, max_failed: 1}}"), r"reward\.parts\.a\.max_failed is no key of verifier"),
        (sum_of("{a: {kind: function}}"), r"reward\.parts\.a\.function has no value: add it to the part"),
        (sum_of("{a: {kind: function, function: b}}"), r"^reward\.parts\.a\.function must be like .* \(got 'b'\)"),
        (sum_of("{a: {kind: model, steps: two}}"), r"^reward\.parts\.a\.steps: Value 'two' of type 'str' could not be"),
        (
            sum_of("{a: {kind: model}, b: {kind: model}}"),
            r"one reward model .*\(got a, b\): give reward\.parts\.b\.path",
        ),
        (["steps=0"], r"steps must be at least 1 \(got 0\)"),
        (["optim.lr=nan"], r"optim\.lr must be greater than 0 \(got nan\)"),
        (["algo.clip_dual=1"], r"algo\.clip_dual must be greater than 1, or null \(got 1\.0\)"),
        (["algo=rloo", "algo.loss=reinforce", "algo.clip_dual=3"], r"with algo\.loss=reinforce it must be null"),
        (["algo=ppo", "algo.dynamic_sampling=2"], r"ppo compares no group: it must be 0 \(got 2\)"),
        (["algo=dapo", "algo.kl_target=6"], r"algo\.kl_coef, which must then be greater than 0"),
        (["algo=dapo", "algo.ref_every=5"], r"need a reference: algo\.kl_coef must be greater than 0"),
        (["algo.ref_every=5", "algo.ref_decay=0.9"], r"algo\.ref_every \(5\) and algo\.ref_decay exclude each other"),
        (["optim.warmup_steps=-1"], r"optim\.warmup_steps must be at least 0"),
        (["model.lora.rank=-1"], r"model\.lora\.rank must be at least 0 \(got -1\)"),
        (["model.lora.alpha=0"], r"model\.lora\.alpha must be greater than 0 \(got 0\.0\)"),
        (
            ["model.lora.rank=4", "algo.ref_decay=0.9"],
            r"algo\.ref_decay=null \(got 0 and 0\.9\), or model",
        ),
        (["algo.kl_target=0"], r"algo\.kl_target must be greater than 0"),
        (["algo.correction_low=2"], r"correction_low must be at most 1, .* \(got 2\.0 and 2\.0\)"),
        (["algo.overlong_buffer=17"], r"algo\.overlong_buffer .* must be at most 16 \(got 17\)"),
        (["algo.clip_low=1.5"], r"algo\.clip_low must be between 0\.0 and 1\.0 \(got 1\.5\)"),
        (["task=guess"], r"a reward model reads .* one answer, and .* up to 3 answers: choose reward=verifier"),
        (
            ["task=guess", "algo=dpo"],
            r"dpo compares two answers to one prompt, and .* up to 3 answers: set task\.turns=1",
        ),
        (["task=guess", "task.min_range=9"], r"task\.max_range must be between 9 and 12 \(got 7\)"),
        (
            ["task=reasoning_gym", "task.name=x", "task.options={seed: 3}"],
            r"task\.options must not have seed",
        ),
        (["task=reasoning_gym", "task.name=x", "task.options=3"], r"task\.options must be like \{max_terms: 3\}"),
        (["algo=sapo", "algo.tau_negative=0"], r"algo\.tau_negative must be greater than 0"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_what_is_allowed(compose_run, overrides, message):
    with pytest.raises(CompactHydraException, match=message):
        compose_run(*overrides)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["transfer=disk", "transfer.slots=3"], "belongs to the ipc transfer: transfer.slots needs transfer=ipc"),
        (
            ["transfer=ipc", "transfer.bucket_mib=3"],
            "belongs to the gloo or nccl transfer: transfer.bucket_mib needs transfer=gloo",
        ),
        (["experiment=smoke", "reward.steps=3"], "belongs to the model reward: reward.steps needs reward=model"),
        (
            ["task=arithmetic", "+task.letters=4"],
            "belongs to the sort or reverse or guess task: task.letters needs task=sort",
        ),
    ],
)
def test_a_key_of_another_choice_is_told_apart_from_a_typo(overrides, hint):
    assert misplaced(overrides) == [f"that key {hint}"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["transfer.slots=3", "reward.steps=3", "transfer.sender.url=[http://127.0.0.1:1]"],  # the defaults have them
        ["transfer=disk", "transfer.bucket_mb=3"],  # nobody has it
        ["task=nothing", "transfer.slots=3"],  # the mistake is another
        ["seed=1", "steps=3", "--cfg", "job"],
    ],
)
def test_there_is_no_hint_where_no_key_is_misplaced(overrides):
    assert misplaced(overrides) == []


def test_a_value_that_hydra_takes_in_quotes_alone_has_a_hint():
    (hint,) = misplaced(["task=jsonl", "task.path=x", "task.answer_after=####"])
    assert hint == "a value that begins with # needs quotes of its own: \"task.answer_after='####'\""


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["algo=grpo"], False),
        (["algo=grpo", "updates_per_step=4"], False),
        (["algo=grpo", "algo.correction=tis"], True),
        (["algo=grpo", "algo.correction=sequence", "algo.kl_coef=0"], True),
        (["algo=grpo", "algo.kl_in=reward"], True),
        (["algo=grpo", "algo.kl_in=reward", "algo.kl_coef=0"], False),
        (["algo=grpo", "algo.kl_target=0.1"], True),
        (["algo=dpo"], False),
    ],
)
def test_all_log_probs_are_asked_for_where_the_objective_computes_with_them_or_they_cost_nothing(
    compose_run, overrides, needed
):
    vllm = ["rollout=vllm", "transfer.take=copy"]
    assert needs_logprobs(compose_run(*overrides).algo) == needed
    assert all_logprobs(compose_run(*overrides))
    assert all_logprobs(compose_run(*overrides, *vllm)) == needed
    assert all_logprobs(compose_run(*overrides, *vllm, "rollout.logprobs=all"))
    assert needed or not all_logprobs(compose_run(*overrides, "rollout.logprobs=sample"))


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["prompts_per_step=64", "samples_per_prompt=8"], 512),
        (["prompts_per_step=64", "samples_per_prompt=8", "rollout.workers=3"], 176),
        (["prompts_per_step=64", "samples_per_prompt=8", "rollout.rows_per_request=100"], 100),
        (["prompts_per_step=4", "samples_per_prompt=200", "rollout.rows_per_request=100"], 200),
        (["prompts_per_step=2", "samples_per_prompt=2", "task.held_out=16"], 32),
        (["prompts_per_step=2", "samples_per_prompt=2", "task.held_out=50", "evaluate.samples=4"], 200),
        (["algo=dpo", "algo.prompts=64", "samples_per_prompt=4", "task.held_out=8"], 256),
        (["prompts_per_step=64", "rollout.engine_args={max_num_seqs: 7}"], 7),
        (["prompts_per_step=64", "rollout.engine_args={max_num_batched_tokens: 48}"], 48),
    ],
)
def test_vllm_prepares_for_the_rows_that_a_worker_gets_at_once(compose_run, overrides, rows):
    run = compose_run("rollout=vllm", "transfer.take=copy", *overrides)
    assert _engine(run)["engine_args"]["max_num_seqs"] == rows


@pytest.mark.parametrize(
    ("overrides", "take"),
    [
        ((), Take.view),
        (("transfer.staging=live",), Take.view),
        (("trainer=replicas", "trainer.ranks=2"), Take.view),
        (("trainer=sharded", "trainer.ranks=2"), Take.copy),
        (("rollout=vllm",), Take.copy),
        (("rollout.gpus=[1]",), Take.copy),
    ],
)
def test_weights_are_viewed_unless_they_can_only_be_copied(compose_run, overrides, take):
    assert compose_run(*overrides).transfer.take is take

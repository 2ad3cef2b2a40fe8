"""A chat model that ends its turns with another token than EOS: where it stops, and what it is taught."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from chat_checkpoint import EOS, GENERATION, IDS, TURN, chat_checkpoint, tokenizer_of, write_conversations
from composed import composed_evaluation

from rlhf.assembly.saved_policy import evaluate_policy
from rlhf.config import Device, HfModelConfig, JsonlTaskConfig, TinyModelConfig
from rlhf.models.policy import make_policy
from rlhf.models.stop_tokens import ended, stop_ids, text_end, turn_end
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, score_texts, scores, value_model
from rlhf.rollout.build import build_model
from rlhf.rollout.spec_of_run import worker_spec
from rlhf.rollout.worker import Worker
from rlhf.run import run
from rlhf.stages.dpo import tokenised
from rlhf.tasks import make_task, read_task
from rlhf.types import Pair, Prompt

ASKED = {"role": "user", "content": "ab?"}
NEWLINE = IDS["\n"]


def loaded(folder):
    return make_tokenizer(HfModelConfig(path=str(folder), device=Device.cpu), "", chat=False)


def policy_of(folder):
    config = HfModelConfig(path=str(folder), device=Device.cpu)
    tokenizer = make_tokenizer(config, "", chat=False)
    return make_policy(config, tokenizer, 0), tokenizer


def in_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def talk(tmp_path):
    """Overrides of a run that trains the chat model in this process on conversations."""
    folder = chat_checkpoint(tmp_path / "chat")
    data = write_conversations(tmp_path / "talk.jsonl")
    small = "experiment=smoke model=hf steps=2 sft.steps=0 task=jsonl task.held_out=8 transfer=local logger=jsonl"
    return [*small.split(), f"model.path={folder}", f"task.path={data}", "rollout.max_new_tokens=12", "optim.lr=1e-5"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- where a policy stops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": [EOS, TURN]}, EOS, (EOS, TURN)),
        ({"eos_token_id": TURN}, EOS, (TURN,)),
        ({"temperature": 0.6}, TURN, (TURN,)),
        (None, [TURN, EOS], (TURN, EOS)),
        (None, None, (EOS,)),
        ({"eos_token_id": [50256, -1]}, 50256, (EOS,)),
    ],
    ids=[
        "a list",
        "another token",
        "of config.json",
        "a list of config.json",
        "of the tokenizer",
        "none of the model's",
    ],
)
def test_stop_ids_are_those_of_generation_config_else_of_config_else_of_the_tokenizer(
    tmp_path, generation, config, stops
):
    chat_checkpoint(tmp_path, generation)
    in_config(tmp_path, eos_token_id=config)
    policy, tokenizer = policy_of(tmp_path)
    assert stop_ids(tokenizer) == stops
    named = stops[0] if len(stops) == 1 else list(stops)
    assert policy.config.eos_token_id == policy.generation_config.eos_token_id == named


def test_a_tiny_model_stops_at_its_tokenizers_end():
    tokenizer = make_tokenizer(TinyModelConfig(), "abc", chat=True)
    assert stop_ids(tokenizer) == (tokenizer.eos_token_id,)
    assert text_end(tokenizer) == turn_end(tokenizer) == [tokenizer.eos_token_id]


def test_a_run_of_a_chat_model_stops_where_its_turns_end_and_its_saved_policy_stops_there_too(
    compose_run, tmp_path, talk
):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    run(compose_run(*talk), tmp_path / "run")
    trained = [row for row in metrics(tmp_path / "run") if "train/truncated" in row]
    assert len(trained) == 2 and all(row["train/truncated"] < 0.1 for row in trained), (
        "each token ends nine rows of ten"
    )
    answers = [json.loads(line)["answer"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert answers and not any("<turn>" in answer for answer in answers), "what ends an answer is no part of it"

    saved = tmp_path / "run" / "policy"
    assert json.loads((saved / "generation_config.json").read_text()) == GENERATION
    told = GenerationConfig.from_pretrained(saved)
    assert (told.eos_token_id, told.temperature, told.top_p, told.top_k) == ([EOS, TURN], 0.6, 0.9, 7)
    tokenizer, model = AutoTokenizer.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
    text = tokenizer.apply_chat_template([ASKED], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert said[0, ids.shape[1] :].tolist() == [TURN]


@pytest.mark.slow
def test_an_evaluation_of_the_saved_policy_stops_where_the_run_did(compose_run, tmp_path, talk):
    run(compose_run(*talk), tmp_path / "run")
    task = [override for override in talk if override.startswith(("task", "rollout", "transfer"))]
    numbers = evaluate_policy(composed_evaluation(f"model.path={tmp_path}/run/policy", *task), tmp_path / "evaluated")
    assert numbers["truncated"] < 0.1 and numbers["tokens_per_answer"] < 2


@pytest.mark.slow
def test_a_run_with_an_adapter_saves_a_merged_policy_that_stops(compose_run, tmp_path, talk):
    run(compose_run(*talk, "model.lora.rank=2"), tmp_path / "run")
    assert all(row["train/truncated"] < 0.1 for row in metrics(tmp_path / "run") if "train/truncated" in row)
    assert json.loads((tmp_path / "run" / "policy" / "generation_config.json").read_text()) == GENERATION


@pytest.mark.slow
def test_a_run_that_goes_on_stops_where_it_did_and_saves_the_same(compose_run, tmp_path, talk):
    run(compose_run(*talk, "checkpoint.every=1"), tmp_path / "run")
    for name in ("00000002", "00000001"):
        kept = tmp_path / "run" / "checkpoints" / name / "policy" / "generation_config.json"
        assert json.loads(kept.read_text()) == GENERATION, "checkpoints are folders that can be served, too"
    run(compose_run(*talk, "checkpoint.every=1", "steps=3"), tmp_path / "run", resume=True)
    trained = [row["train/truncated"] for row in metrics(tmp_path / "run") if "train/truncated" in row]
    assert len(trained) == 3 and max(trained) < 0.1
    assert json.loads((tmp_path / "run" / "policy" / "generation_config.json").read_text()) == GENERATION


def test_a_worker_that_is_asked_without_stop_ids_stops_at_those_of_the_run(compose_run, tmp_path, talk):
    config = compose_run(*talk)
    policy, _ = policy_of(tmp_path / "chat")
    spec = worker_spec(policy, config, {"backend": "local"})
    model = build_model(type(spec).from_json(spec.to_json()))
    worker = Worker.around(model, spec.endpoint)
    assert worker._limits.stop_ids == (EOS, TURN)


# --- what is put behind an answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "generation", "end"),
    [
        ("{{ messages[-1].content }}<turn>\n", [EOS, TURN], [TURN]),  # Gemma, Qwen, Llama 3
        ("{{ messages[-1].content }}\n<turn>\n<eos>", [EOS, TURN], [NEWLINE, TURN]),  # Phi 3
        ("{{ messages[-1].content }}<eos>", [EOS, TURN], [EOS]),  # Mistral
        ("{{ messages[-1].content }}<turn>\n", [EOS], [EOS]),  # a base model with a template
        ("{{ messages[-1].content }}", [TURN, EOS], [EOS]),
        ("{{ raise_exception('no') }}", [TURN, EOS], [EOS]),
        ("{{ 1 + messages[0].content }}", [TURN, EOS], [EOS]),
        (None, [TURN, EOS], [EOS]),
    ],
    ids=[
        "the turn's end",
        "with what is before it",
        "eos",
        "no stop id",
        "nothing",
        "a template that refuses",
        "one that fails",
        "none",
    ],
)
def test_an_answer_in_a_conversation_ends_with_the_templates_own_turn_end(template, generation, end):
    tokenizer = tokenizer_of(template)
    tokenizer.stop_ids = tuple(generation)
    assert turn_end(tokenizer) == end


def test_an_answer_to_a_plain_text_ends_with_the_tokenizers_end_if_the_model_stops_there_else_with_the_first_stop_id():
    tokenizer = tokenizer_of()
    for stops, end in (((TURN, EOS), EOS), ((TURN,), TURN), ((7, TURN), 7)):
        tokenizer.stop_ids = stops
        assert text_end(tokenizer) == [end]


def test_demonstrations_and_preferences_end_as_their_prompts_want_it(tmp_path):
    tokenizer = loaded(chat_checkpoint(tmp_path / "chat"))
    raw = read_task(JsonlTaskConfig(path=str(write_conversations(tmp_path / "talk.jsonl")), held_out=8), seed=0)
    task = make_task(raw, tokenizer)
    prompts, answers = zip(*task.demonstrations, strict=True)
    rows = ended(tokenizer, prompts, answers)
    assert all(row == [*tokenizer.encode(answer), TURN] for row, answer in zip(rows, answers, strict=True))
    plain = Prompt("ab?", tuple(tokenizer.encode("ab?")))
    pairs = [Pair(prompts[0], "a", "b"), Pair(plain, "a", "b")]
    chosen, rejected = zip(*[(row.chosen, row.rejected) for row in tokenised(pairs, tokenizer, 64)], strict=True)
    assert [row[-1] for row in chosen] == [row[-1] for row in rejected] == [TURN, EOS]


def test_a_reward_model_reads_the_end_that_the_policy_samples(tmp_path):
    policy, tokenizer = policy_of(chat_checkpoint(tmp_path))
    model = value_model(policy, Head.sequence)
    torch.nn.init.normal_(model.score.weight)
    torch.nn.init.normal_(model.model.final_layernorm.weight)  # else it says the same of everything
    talk = Prompt("<user>ab?<turn>\n<model>", (), messages=[ASKED])
    plain = Prompt("ab?", ())
    found = score_texts(model, tokenizer, [talk, plain], ["b", "b"])
    rows = [tokenizer.encode(talk.text + "b<turn>"), tokenizer.encode("ab?b<eos>")]
    right = [scores(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows]
    assert [row[-1] for row in rows] == [TURN, EOS]
    assert torch.allclose(found, torch.cat(right), atol=1e-5)


@pytest.mark.slow
def test_sft_on_conversations_teaches_a_policy_to_end_its_turns(compose_run, tmp_path, talk):
    run(compose_run(*talk, "sft.steps=40", "sft.lr=0.05", "steps=1"), tmp_path / "run")
    numbers = metrics(tmp_path / "run")[0]
    assert numbers["eval/gold"] > 0, "after letters that it had never said, too"
    assert next(row["train/truncated"] for row in metrics(tmp_path / "run") if "train/truncated" in row) < 0.1


# --- padding that is a stop id ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["<eos>", "<turn>"])
def test_a_padding_token_that_is_a_stop_id_changes_no_mask_and_no_score(compose_run, tmp_path, talk, pad):
    folder = chat_checkpoint(tmp_path / "padded", pad_token=pad)
    runs = {}
    for name in ("chat", "padded"):
        overrides = [override for override in talk if not override.startswith("model.path")]
        run(compose_run(*overrides, f"model.path={tmp_path / name}"), tmp_path / f"run-{name}")
        runs[name] = [
            {key: value for key, value in row.items() if key.startswith(("train/", "eval/"))}
            for row in metrics(tmp_path / f"run-{name}")
        ]
    assert runs["chat"] == runs["padded"]
    policy, tokenizer = policy_of(folder)
    assert tokenizer.pad_token_id in stop_ids(tokenizer)
    model = value_model(policy, Head.sequence)
    torch.nn.init.normal_(model.score.weight)
    torch.nn.init.normal_(model.model.final_layernorm.weight)
    plain = copy.deepcopy(model)
    row = torch.tensor([[*tokenizer.encode("<user>a?<turn>\n<model>b"), tokenizer.pad_token_id]])
    mask = torch.ones_like(row)
    with torch.no_grad():
        assert plain(input_ids=row, attention_mask=mask).logits.item() == pytest.approx(
            scores(model, row, mask).item(), abs=1e-5
        ), "transformers takes a padding token at the end for padding, whatever the mask says"

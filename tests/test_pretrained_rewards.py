"""Other people's reward models: scores are those of their own forward pass, on the text that they were made for."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from rlhf.config import Device, JsonlTaskConfig, ModelRewardConfig, TinyModelConfig
from rlhf.models.reward_model import load_reward_model
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import score_texts
from rlhf.rewards import given_rewards
from rlhf.rewards.model import ModelReward
from rlhf.run import run
from rlhf.tasks import make_task, read_task
from rlhf.types import Prompt, Task

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "distilbert": SHAPE | {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "roberta": SHAPE | {"max_position_embeddings": 66},
    "electra": SHAPE | {"embedding_size": 16},
    "modernbert": SHAPE | {"local_attention": 8},
    "deberta-v2": SHAPE | {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE | {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},  # looks at the last place, padding or not
}
FAMILIES = ENCODERS | DECODERS
TEMPLATE = (  # unlike the policy's
    "{% for message in messages %}{{ '#' + message['role'] + '#' + message['content'] + eos_token }}{% endfor %}"
)
QUESTIONS = ["Hi?", "Is it so late?", "Why, why?", "No more of it?"]
ANSWERS = ["", "yes", "no, it is not", "perhaps"]
CPU = TinyModelConfig(device=Device.cpu)


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A character a token; encoders put theirs around a text, as BERT does."""
    encoder = family in ENCODERS
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if encoder else {}
    words = [*special.values(), *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    if encoder:
        around = [(word, words.index(word)) for word in ("[CLS]", "[SEP]")]
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def reward_model(folder: Path, family: str, template: str | None = TEMPLATE, **options: Any) -> Path:
    """A folder as people publish them."""
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = template
    told = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(family, **(FAMILIES[family] | told | options))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn(len(parameter)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def task_of(folder: Path, chat: bool) -> Task:
    """Questions as messages, or as texts, with the policy's tokenizer and template."""
    rows = [{"prompt": [{"role": "user", "content": text}] if chat else text} for text in QUESTIONS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = read_task(JsonlTaskConfig(path=str(folder / "rows.jsonl"), held_out=1), 0)
    return make_task(raw, make_tokenizer(CPU, raw.characters(), raw.conversational))


def plainly(folder: Path, texts: list[str], **options: Any) -> list[float]:
    """What a user of the model's card computes: one text after the other."""
    tokenizer, scores = AutoTokenizer.from_pretrained(folder), []
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    takes = model.forward.__wrapped__ if hasattr(model.forward, "__wrapped__") else model.forward
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", **options)
        if "token_type_ids" not in takes.__code__.co_varnames:
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            scores.append(float(model(**inputs).logits[0, 0]))
    return scores


def loaded(folder: Path, task: Task, **options: Any) -> ModelReward:
    """The reward of a run with `reward.path=folder`."""
    config = ModelRewardConfig(path=str(folder), **options)
    (reward,) = given_rewards(config, task, CPU).values()
    assert isinstance(reward, ModelReward)
    return reward


def all_of(task: Task) -> tuple[list[Prompt], list[str]]:
    """Every prompt with every answer, so that lengths differ much."""
    rows = [(prompt, answer) for prompt in (*task.train, *task.held_out) for answer in ANSWERS]
    return [prompt for prompt, _ in rows], [answer for _, answer in rows]


def as_chat(folder: Path, prompts: list[Prompt], answers: list[str]) -> list[str]:
    """The conversations as the reward model's template has them; the prompts' texts are without the policy's marks."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [prompt.text.removeprefix("<|user|>").removesuffix("<|assistant|>") for prompt in prompts]
    messages = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(asked, answers, strict=True)
    ]
    return [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in messages]


# --- the right text, and the model's own forward pass -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_scores_as_the_models_own_template_and_forward_pass_have_it(tmp_path, family):
    folder, task = reward_model(tmp_path / "model", family), task_of(tmp_path, chat=True)
    prompts, answers = all_of(task)
    assert prompts[0].text.startswith("<|user|>"), "the policy's template is another"
    special = family in ENCODERS  # whose template here leaves the first token, that is asked, to the tokenizer
    expected = plainly(folder, as_chat(folder, prompts, answers), add_special_tokens=special)
    assert loaded(folder, task)(prompts, answers) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1, "else nothing was tried"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_scores_as_the_models_own_tokenizer_and_forward_pass_have_it(tmp_path, family):
    folder, task = reward_model(tmp_path / "model", family, template=None), task_of(tmp_path, chat=False)
    prompts, answers = all_of(task)
    texts = [prompt.text + answer for prompt, answer in zip(prompts, answers, strict=True)]
    assert loaded(folder, task)(prompts, answers) == pytest.approx(plainly(folder, texts), abs=1e-4)


def test_a_prompt_of_text_is_the_users_message_to_a_model_of_conversations(tmp_path):
    folder, task = reward_model(tmp_path / "model", "llama"), task_of(tmp_path, chat=False)
    prompts, answers = all_of(task)
    expected = plainly(folder, as_chat(folder, prompts, answers), add_special_tokens=False)
    assert loaded(folder, task)(prompts, answers) == pytest.approx(expected, abs=1e-4)


def test_special_tokens_that_the_template_writes_are_not_written_again(tmp_path):
    template = "[CLS]{% for message in messages %}{{ message['content'] }}[SEP]{% endfor %}"
    folder, task = reward_model(tmp_path / "model", "bert", template), task_of(tmp_path, chat=True)
    prompts, answers = all_of(task)
    expected = plainly(folder, as_chat(folder, prompts, answers), add_special_tokens=False)
    assert loaded(folder, task)(prompts, answers) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pad", [None, 2], ids=["none", "eos"])
def test_a_pad_token_that_is_none_or_that_ends_every_row_changes_no_score(tmp_path, family, pad):
    folder, task = reward_model(tmp_path / "model", family, pad_token_id=pad), task_of(tmp_path, chat=True)
    prompts, answers = all_of(task)
    expected = plainly(folder, as_chat(folder, prompts, answers), add_special_tokens=False)
    assert loaded(folder, task)(prompts, answers) == pytest.approx(expected, abs=1e-4)


def test_a_model_that_padding_changes_gets_none(tmp_path):
    task = task_of(tmp_path, chat=True)
    assert not loaded(reward_model(tmp_path / "xlnet", "xlnet"), task).pads
    assert loaded(reward_model(tmp_path / "bert", "bert"), task).pads


def test_a_conversation_needs_a_template_which_may_be_given(tmp_path):
    folder, task = reward_model(tmp_path / "model", "llama", template=None), task_of(tmp_path, chat=True)
    with pytest.raises(ValueError, match=r"^reward\.path: .* no chat template: give reward\.chat_template, or choose"):
        loaded(folder, task)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    prompts, answers = all_of(task)
    with_its_own = loaded(reward_model(tmp_path / "other", "llama"), task)(prompts, answers)
    for given in (TEMPLATE, str(tmp_path / "template.jinja")):
        assert loaded(folder, task, chat_template=given)(prompts, answers) == with_its_own
    with pytest.raises(ValueError, match=r"reward\.chat_template must be Jinja, or a file of it \(got 'nowhere': "):
        loaded(folder, task, chat_template="nowhere")
    with pytest.raises(ValueError, match=r"reward\.chat_template is for the reward model of reward\.path"):
        ModelRewardConfig(chat_template=TEMPLATE)


def test_a_template_that_refuses_the_data_is_told_at_once(tmp_path):
    template = "{{ raise_exception('no questions') if messages[0]['content'].endswith('?') }}"
    folder, task = reward_model(tmp_path / "model", "llama", template), task_of(tmp_path, chat=True)
    with pytest.raises(ValueError, match=r"^reward\.path: the reward model's chat template refuses .*no questions"):
        loaded(folder, task)


def test_a_reward_model_of_another_run_reads_conversations_by_its_own_template(tmp_path):
    folder, task = reward_model(tmp_path / "model", "llama", reward_mean=0.5, reward_std=2.0), task_of(tmp_path, True)
    model, tokenizer = load_reward_model(str(folder), CPU)
    prompts, answers = all_of(task)
    asked = [
        replace(p, text=tokenizer.apply_chat_template([*p.messages], tokenize=False, add_generation_prompt=True))
        for p in prompts
    ]
    raw = score_texts(model, tokenizer, asked, answers).tolist()
    assert asked[0].text.startswith("#user#")
    assert loaded(folder, task)(prompts, answers) == pytest.approx([(score - 0.5) / 2.0 for score in raw], abs=1e-5)


def test_a_template_has_the_datas_tools_an_answer_that_is_begun_and_the_runs_first_day(tmp_path):
    template = "{{ strftime_now('%Y') }}|{{ tools | tojson if tools }}|" + TEMPLATE
    folder = reward_model(tmp_path / "model", "llama", template)
    messages = ({"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Well, "})
    tools = [{"name": "look"}]
    prompt = Prompt("<|user|>Hi?<|assistant|>Well, ", (3,), messages=messages, given={"tools": tools})
    task = replace(task_of(tmp_path, chat=True), train=[prompt], held_out=[])
    config = ModelRewardConfig(path=str(folder))
    (reward,) = given_rewards(config, task, CPU, datetime(1999, 12, 31)).values()
    text = '1999|[{"name": "look"}]|#user#Hi?[EOS]#assistant#Well, yes[EOS]'
    assert reward([prompt], ["yes"]) == pytest.approx(plainly(folder, [text], add_special_tokens=False), abs=1e-4)


def test_a_template_of_another_runs_reward_model_that_refuses_the_data_is_told_at_once(tmp_path):
    template = "{{ raise_exception('no questions') }}"
    folder, task = reward_model(tmp_path / "model", "llama", template, reward_mean=0.0), task_of(tmp_path, chat=True)
    with pytest.raises(ValueError, match=r"^reward\.path: .*chat template refuses a conversation \(no questions\)"):
        loaded(folder, task)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "gpt2", "llama"])
def test_a_row_that_is_longer_than_the_models_positions_has_no_score_and_is_counted(tmp_path, family):
    folder, task = reward_model(tmp_path / "model", family, template=None), task_of(tmp_path, chat=False)
    reward, prompt = loaded(folder, task), next(p for p in task.train if p.text in QUESTIONS[:2])
    fits = 64 - len(prompt.text) - 2 * (family in ENCODERS)  # and special tokens
    scores = reward([prompt] * 3, ["x" * fits, "x" * (fits + 1), "x" * 500])
    assert scores == [pytest.approx(*plainly(folder, [prompt.text + "x" * fits]), abs=1e-4), None, None]
    assert reward.report.errors == 2
    assert "reward.path: rows are longer than the 64 tokens that the reward model takes" in reward.report.error
    assert reward([prompt], ["yes"]) != [None] and reward.report.errors is None


def test_a_prompt_that_is_longer_than_the_models_positions_is_refused(tmp_path):
    folder, task = reward_model(tmp_path / "model", "roberta", max_position_embeddings=30), task_of(tmp_path, True)
    with pytest.raises(
        ValueError, match=r"^reward\.path: the longest prompt has \d+ tokens as .* which takes 28: leave"
    ):
        loaded(folder, task)


def test_a_row_that_is_longer_than_learned_positions_of_a_runs_own_reward_model_has_no_score(tmp_path):
    folder, task = reward_model(tmp_path / "model", "gpt2", None, reward_mean=0.0), task_of(tmp_path, chat=False)
    reward, prompt = loaded(folder, task), task.train[0]
    fits = 64 - len(prompt.text) - 1  # and EOS
    scores = reward([prompt] * 2, ["x" * fits, "x" * (fits + 1)])
    assert scores[0] is not None and scores[1] is None and reward.report.errors == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 2}, r"^reward\.path: .* with num_labels=1 is needed, this is .* with num_labels=2"),
        ({"vocab_size": 50}, r"^reward\.path: the tokenizer of .* has \d+ tokens, and the model embeds only 50"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_folder_that_is_no_reward_model_is_refused(tmp_path, family, options, message):
    folder = reward_model(tmp_path / "model", family, **options)
    with pytest.raises(ValueError, match=message):
        loaded(folder, task_of(tmp_path, chat=True))


def test_a_reward_model_is_refused_before_anything_is_trained(tmp_path, compose_run, monkeypatch):
    monkeypatch.setattr("rlhf.assembly.warm_up.sft", lambda *_: pytest.fail("SFT began"))
    monkeypatch.setattr("rlhf.assembly.parts.Workers", lambda *_: pytest.fail("workers began"))
    folder = reward_model(tmp_path / "model", "llama", num_labels=2)
    with pytest.raises(ValueError, match=r"^reward\.path: .* with num_labels=1 is needed"):
        run(compose_run("experiment=smoke", "reward=model", f"reward.path={folder}"), tmp_path / "run")


def test_a_model_whose_scores_are_no_numbers_or_that_fails_is_refused(tmp_path, monkeypatch):
    folder, task = reward_model(tmp_path / "model", "llama"), task_of(tmp_path, chat=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"^reward\.path: LlamaForSequenceClassification gives scores that are no num"):
        loaded(folder, task)
    kept = "{{ '[EOS]' if messages | length > 9 }}"  # no text at all
    with pytest.raises(ValueError, match=r"^reward\.path: LlamaForSequenceClassification fails on the first prompts"):
        loaded(folder, task, chat_template=kept)


# --- scores that are cut ----------------------------------------------------------------------------------------------


def far_apart(folder: Path) -> Path:
    """The same model with scores of other people's sizes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data.mul_(1000)
    model.save_pretrained(folder)
    return folder


def test_scores_of_other_peoples_models_are_as_they_are_unless_asked(tmp_path):
    folder, task = far_apart(reward_model(tmp_path / "model", "llama")), task_of(tmp_path, chat=True)
    prompts, answers = all_of(task)
    whole = loaded(folder, task)
    scores = whole(prompts, answers)
    assert max(map(abs, scores)) > 100 and whole.report.counts == {}
    bounded = loaded(folder, task, clip=20)
    assert bounded(prompts, answers) == [max(-20, min(20, score)) for score in scores]
    assert bounded.report.counts == {"clipped": sum(abs(score) > 20 for score in scores)}


def test_normalised_scores_are_cut_at_ten_deviations_unless_told_otherwise_and_counted(tmp_path):
    folder = far_apart(reward_model(tmp_path / "model", "llama", reward_mean=0.0, reward_std=1.0))
    task = task_of(tmp_path, chat=True)
    prompts, answers = all_of(task)
    whole, bounded = loaded(folder, task, clip=None), loaded(folder, task)
    scores = whole(prompts, answers)
    assert bounded(prompts, answers) == [max(-10, min(10, score)) for score in scores]
    assert bounded.report.counts == {"clipped": sum(abs(score) > 10 for score in scores)} != {"clipped": 0}


@pytest.mark.parametrize("clip", [0, -1, "no", True, float("nan")])
def test_a_cut_that_is_none_is_refused(clip):
    with pytest.raises(ValueError, match=r"reward\.clip must be auto, null or a number greater than 0 \(got "):
        ModelRewardConfig(clip=clip)


def test_a_reward_model_that_says_the_same_of_everything_is_worth_nothing_rather_than_rounding(tmp_path):
    task = task_of(tmp_path, chat=False)
    reward = ModelReward(*load_reward_model(str(reward_model(tmp_path / "model", "llama", reward_mean=0.0)), CPU))
    reward._raw = lambda prompts, answers: [float(torch.tensor(0.7))] * len(answers)  # type: ignore[method-assign]
    reward.calibrate(task.train * 33, ["x"] * (33 * len(task.train)))
    assert reward(task.train, ["x"] * len(task.train)) == [0.0] * len(task.train)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_trains_on_the_scores_that_the_reward_model_gives_and_logs_how_many_were_cut(tmp_path, compose_run):
    folder = far_apart(reward_model(tmp_path / "model", "llama"))
    task_of(tmp_path, chat=True)
    small = ("steps=2", "sft.steps=0", "evaluate_every=2", "prompts_per_step=2", "rollout.max_new_tokens=4")
    dials = ("task=jsonl", f"task.path={tmp_path}/rows.jsonl", "task.held_out=1", "transfer=local", "logger=jsonl")
    parts = f"reward.parts={{judge: {{kind: model, path: {folder}, clip: 50}}}}"
    run(compose_run("experiment=smoke", "reward=sum", parts, *dials, *small), tmp_path / "run")
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["train/reward_clipped"] <= 16 for row in told if "train/loss" in row)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = row["prompt"].removeprefix("<|user|>").removesuffix("<|assistant|>")
        conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": row["answer"]}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        (score,) = plainly(folder, [text], add_special_tokens=False)
        assert row["reward"] == pytest.approx(max(-50, min(50, score)), abs=1e-2)

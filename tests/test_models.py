"""The policy, its tokenizer, reward models and critics. Made small enough that nothing is downloaded."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import Device, HfModelConfig, Precision, TinyModelConfig
from rlhf.models.device import resolve_device
from rlhf.models.policy import ARCHITECTURES, make_policy
from rlhf.models.reward_model import load_reward_model
from rlhf.models.saving import save_model
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, scores, value_model

LETTERS = "abcdefgh= <>|eos"
TINY = TinyModelConfig(layers=2, hidden=32, heads=2, intermediate=48, context=64, device=Device.cpu)
torch.set_num_threads(1)


def tiny(**options):
    config = TinyModelConfig(
        **{"layers": 2, "hidden": 32, "heads": 2, "intermediate": 48, "device": Device.cpu} | options
    )
    tokenizer = make_tokenizer(config, LETTERS, chat=False)
    return make_policy(config, tokenizer, seed=0), tokenizer


def with_random_head(policy, head):
    model = value_model(policy, head)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model


def logits(policy, ids):
    with torch.no_grad():
        return policy(input_ids=torch.tensor([ids])).logits


# --- tokenizer --------------------------------------------------------------------------------------------------------


ODD = "abc \t\n<eos>|user0é中🙂\u0301\u200d"  # combining and joining characters, and those of the special tokens
ROUND_TRIPS = {chat: make_tokenizer(TINY, ODD, chat) for chat in (False, True)}


@given(text=st.text(alphabet=ODD, max_size=30) | st.sampled_from(["<eos>", "u<|user|>"]), chat=st.booleans())
def test_a_text_over_the_alphabet_survives_encoding(text, chat):
    tokenizer = ROUND_TRIPS[chat]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.batch_decode([ids, ids], skip_special_tokens=True) == [text, text]
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} & set(ids)


def test_padding_and_end_are_different_tokens_and_vanish_in_decoding():
    tokenizer = make_tokenizer(TINY, "ab", chat=False)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    ids = [tokenizer.pad_token_id, *tokenizer.encode("ab"), tokenizer.eos_token_id]
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == ["ab"]


def test_a_character_outside_the_alphabet_is_unknown():
    tokenizer = make_tokenizer(TINY, "ab", chat=False)
    assert tokenizer.encode("azb")[1] == tokenizer.unk_token_id


def test_a_text_that_spells_a_special_token_does_not_end_the_sequence():
    tokenizer = make_tokenizer(TINY, LETTERS, chat=False)
    assert tokenizer.eos_token_id not in tokenizer.encode("a<eos>b")


def test_the_order_of_the_characters_does_not_change_the_tokenizer():
    assert make_tokenizer(TINY, "cab", False).encode("abc") == make_tokenizer(TINY, ["a", "b", "c"], False).encode(
        "abc"
    )


def test_conversations_are_tagged_with_one_token_a_role():
    tokenizer = make_tokenizer(TINY, "abc", chat=True)
    conversation = [
        {"role": "system", "content": "c"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "a"},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>c<|user|>ab<|assistant|>b<|user|>a<|assistant|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 5 + 5
    assert tokenizer.unk_token_id not in ids


def test_texts_that_are_no_conversations_get_no_chat_template():
    assert make_tokenizer(TINY, "abc", chat=False).chat_template is None


# --- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chat", [False, True])
def test_a_saved_policy_is_a_plain_folder_that_transformers_and_model_hf_load(tmp_path, architecture, chat):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = TinyModelConfig(architecture=architecture, hidden=32, heads=2, intermediate=48, device=Device.cpu)
    tokenizer = make_tokenizer(config, LETTERS, chat)
    policy = make_policy(config, tokenizer, seed=0)
    save_model(policy, tokenizer, tmp_path)
    ids = tokenizer.encode("ab <eos>c=")
    hf = HfModelConfig(path=str(tmp_path), device=Device.cpu)
    again = make_tokenizer(hf, "", chat=False)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), again):
        assert loaded.encode("ab <eos>c=") == ids
        assert loaded.decode(ids) == "ab <eos>c="
        assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert loaded.chat_template == tokenizer.chat_template
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path), make_policy(hf, again, seed=7)):
        assert torch.equal(logits(model, ids), logits(policy, ids))


def test_the_seed_alone_decides_the_weights():
    first, _ = tiny()
    torch.manual_seed(99)
    again, tokenizer = tiny()
    other = make_policy(TINY, tokenizer, seed=1)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_making_models_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    policy, _ = tiny()
    value_model(policy, Head.token)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_policy_ties_its_embeddings_and_is_in_eval_mode():
    policy, tokenizer = tiny()
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
    assert policy.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert not policy.training


def test_the_dtype_and_the_attention_are_those_of_the_configuration(tmp_path):
    policy, tokenizer = tiny(dtype=Precision.bfloat16, attention="eager")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    assert policy.config._attn_implementation == "eager"
    save_model(policy, tokenizer, tmp_path)
    config = HfModelConfig(path=str(tmp_path), device=Device.cpu)
    assert {parameter.dtype for parameter in make_policy(config, tokenizer, 0).parameters()} == {torch.float32}


def test_sampling_from_a_policy_warns_of_nothing():
    policy, tokenizer = tiny()
    ids = torch.tensor([tokenizer.encode("ab=")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=3)
    assert out.shape[0] == 1
    assert policy.generation_config.top_k is None
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id


def gpt2_folder(folder, eos="<eos>", rows=32):
    """A checkpoint of another family: other names, dropout, sampling defaults of its own, no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *"abcdefgh="]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token=eos).save_pretrained(folder)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.generation_config.update(do_sample=True, top_k=5, repetition_penalty=1.5)
    model.save_pretrained(folder)
    return HfModelConfig(path=str(folder), device=Device.cpu)


def test_a_checkpoint_of_another_family_loads_without_dropout_and_without_its_sampling_defaults(tmp_path):
    config = gpt2_folder(tmp_path)
    tokenizer = make_tokenizer(config, "", chat=False)
    policy = make_policy(config, tokenizer, 0).train()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert torch.equal(logits(policy, [3, 4, 5]), logits(policy, [3, 4, 5]))
    assert policy.generation_config.repetition_penalty is None or policy.generation_config.repetition_penalty == 1.0
    assert policy.generation_config.top_k is None


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot load a model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load a model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "cannot load a model"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load a tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot load a tokenizer"),
    ],
    ids=["no config", "broken config", "no weights", "broken weights", "no tokenizer", "broken tokenizer"],
)
def test_a_broken_checkpoint_folder_is_one_line_of_error(tmp_path, break_it, reason):
    policy, tokenizer = tiny()
    save_model(policy, tokenizer, tmp_path)
    break_it(tmp_path)
    config = HfModelConfig(path=str(tmp_path), device=Device.cpu)
    with pytest.raises(ValueError, match=r"model\.path") as error:
        make_policy(config, make_tokenizer(config, "", chat=False), 0)
    assert reason in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_weights_is_refused_rather_than_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file

    policy, tokenizer = tiny()
    save_model(policy, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.path: .* lacks weights .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        make_policy(HfModelConfig(path=str(tmp_path), device=Device.cpu), tokenizer, 0)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    config = gpt2_folder(tmp_path, eos=None)
    with pytest.raises(ValueError, match=r"model\.path: .*no end-of-sequence token"):
        make_tokenizer(config, "", chat=False)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(tmp_path):
    config = gpt2_folder(tmp_path, rows=8)
    with pytest.raises(ValueError, match=r"model\.path: .*has 11 tokens, and the model embeds only 8"):
        make_policy(config, make_tokenizer(config, "", chat=False), 0)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    for path in (str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(ValueError, match=r"model\.path: .*there is no folder .*nowhere"):
            make_tokenizer(HfModelConfig(path=path), "", chat=False)


def test_a_hub_name_without_a_network_is_refused_at_once(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing', which is no folder here: the hub cannot be reached"):
        make_tokenizer(HfModelConfig(path="nobody/nothing"), "", chat=False)


def test_an_unknown_architecture_names_those_allowed():
    tokenizer = make_tokenizer(TINY, "ab", chat=False)
    with pytest.raises(ValueError, match=r"model\.architecture must be one of .*qwen3.* \(got 'gpt2'\)"):
        make_policy(TinyModelConfig(architecture="gpt2", device=Device.cpu), tokenizer, 0)


def test_a_gpu_that_is_not_there_is_refused():
    assert resolve_device(Device.cpu) == torch.device("cpu")
    if torch.cuda.is_available():
        assert resolve_device(Device.auto) == torch.device("cuda")
    else:
        assert resolve_device(Device.auto) == torch.device("cpu")
        with pytest.raises(ValueError, match=r"model\.device=cuda"):
            resolve_device(Device.cuda)


# --- reward model and critic ------------------------------------------------------------------------------------------


rows = st.lists(
    st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=4
)  # padding and EOS included
POLICY, TOKENIZER = tiny()
REWARD, CRITIC = with_random_head(POLICY, Head.sequence), with_random_head(POLICY, Head.token)


def padded(rows, side, extra, fill):
    """(ids, mask) [B, L], padded on one side to the longest row plus `extra`."""
    length = max(map(len, rows)) + extra
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[b, place], mask[b, place] = torch.tensor(row), 1
    return ids, mask


def values(model, ids, mask):
    """What a critic says after each position [B, L], 0 on padding."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits.squeeze(-1).float().masked_fill(mask == 0, 0.0)


@given(rows=rows, side=st.sampled_from(["left", "right"]), extra=st.integers(0, 3), fill=st.sampled_from([0, 1, 7]))
@torch.no_grad()
def test_scores_are_the_same_alone_and_under_any_padding(rows, side, extra, fill):
    alone = torch.cat([scores(REWARD, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows])
    batch = scores(REWARD, *padded(rows, side, extra, fill))
    assert batch.shape == (len(rows),)
    torch.testing.assert_close(batch, alone, atol=1e-4, rtol=1e-4)


@given(rows=rows, side=st.sampled_from(["left", "right"]), extra=st.integers(0, 3), fill=st.sampled_from([0, 1, 7]))
@torch.no_grad()
def test_values_are_the_same_alone_and_under_any_padding_and_zero_on_it(rows, side, extra, fill):
    ids, mask = padded(rows, side, extra, fill)
    batch = values(CRITIC, ids, mask)
    assert batch.shape == ids.shape
    assert not batch[mask == 0].any()
    for b, row in enumerate(rows):
        alone = values(CRITIC, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
        torch.testing.assert_close(batch[b][mask[b] == 1], alone[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scores_with_absolute_positions_are_the_same_under_left_padding(tmp_path):
    config = gpt2_folder(tmp_path)
    model = with_random_head(make_policy(config, make_tokenizer(config, "", chat=False), 0), Head.sequence)
    row = torch.tensor([[3, 4, 5, 6]])
    alone = scores(model, row, torch.ones_like(row))
    torch.testing.assert_close(scores(model, *padded(row.tolist(), "left", 5, fill=7)), alone)


def test_the_score_is_taken_at_the_last_real_token():
    row = TOKENIZER.encode("abc=")
    ids, mask = torch.tensor([row]), torch.ones(1, 4, dtype=torch.long)
    critic = value_model(POLICY, Head.token)
    critic.score.weight.data.copy_(REWARD.score.weight.data)
    assert torch.allclose(scores(REWARD, ids, mask), values(critic, ids, mask)[:, -1])
    assert not torch.allclose(scores(REWARD, ids, mask), values(critic, ids, mask)[:, -2])


@pytest.mark.parametrize("head", Head)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_a_value_model_copies_the_backbone_and_begins_at_zero(tmp_path, architecture, head):
    if architecture == "gpt2":
        config = gpt2_folder(tmp_path)
        policy = make_policy(config, make_tokenizer(config, "", chat=False), 0)
    else:
        policy, _ = tiny(architecture=architecture)
    model = value_model(policy, head).train()
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        hidden = policy.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(model.base_model(input_ids=ids).last_hidden_state, hidden)  # in train mode: no dropout
    out = (scores if head is Head.sequence else values)(model, ids, mask)
    assert out.shape == ((1,) if head is Head.sequence else (1, 4))
    assert not out.any()
    assert model.base_model.get_input_embeddings().weight is not policy.get_input_embeddings().weight


def test_a_value_model_can_be_trained_from_its_zero_head():
    model = value_model(POLICY, Head.sequence)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids, mask = torch.tensor([[3, 4], [5, 6]]), torch.ones(2, 2, dtype=torch.long)
    for _ in range(20):
        optimizer.zero_grad()
        first, second = scores(model, ids, mask)
        loss = -torch.nn.functional.logsigmoid(first - second)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert not torch.equal(next(model.base_model.parameters()), next(POLICY.base_model.parameters()))


def test_a_saved_reward_model_loads_again_and_scores_alike(tmp_path):
    from transformers import AutoModelForSequenceClassification

    REWARD.config.reward_mean = 0.25
    save_model(REWARD, TOKENIZER, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    loaded, tokenizer = load_reward_model(str(tmp_path), TINY)
    ids = torch.tensor([tokenizer.encode("abc=")])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(scores(loaded, ids, mask), scores(REWARD, ids, mask))
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)(input_ids=ids, attention_mask=mask)
        assert torch.allclose(plain.logits[:, 0], scores(REWARD, ids, mask))
    assert loaded.config.reward_mean == 0.25


def test_a_policy_is_no_reward_model(tmp_path):
    save_model(POLICY, TOKENIZER, tmp_path)
    with pytest.raises(ValueError, match=r"reward\.path: .* is no reward model: .*Qwen3ForCausalLM with num_labels=2"):
        load_reward_model(str(tmp_path), TINY)


def test_an_architecture_without_a_value_head_is_refused():
    from transformers import CohereConfig, CohereForCausalLM

    numbers = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape = CohereConfig(**numbers, num_attention_heads=2, bos_token_id=None, eos_token_id=1)
    with pytest.raises(ValueError, match=r"no sequence classifier of the architecture 'cohere'.*reward=model"):
        value_model(CohereForCausalLM(shape), Head.sequence)

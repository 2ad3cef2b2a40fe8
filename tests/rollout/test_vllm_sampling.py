"""Engine vllm against a fake of vLLM: what each request asks for, and what becomes of the outputs."""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from rlhf.config import Cut
from rlhf.rollout.sampling import Sampling, seed_of
from rlhf.rollout.vllm import Started, VllmEngine

DELTA, FINAL = "delta", "final"
SAMPLING = Sampling(n=2, max_tokens=3, temperature=0.7, stop_ids=(1,))


class Params(SimpleNamespace):
    """vLLM's SamplingParams."""


@dataclass
class Tokens:
    token_ids: list
    logprobs: object
    finish_reason: str | None


@dataclass
class Output:
    request_id: str
    outputs: list
    finished: bool


@dataclass
class FakeEngine:
    """Samples token 10 + t at position t with log-prob -t, until the limit; the first row stops at its second."""

    vllm_config: object = field(
        default_factory=lambda: SimpleNamespace(model_config=SimpleNamespace(max_model_len=64, enable_sleep_mode=False))
    )
    asked: dict = field(default_factory=dict)
    going: dict = field(default_factory=dict)

    def add_request(self, name, prompt, params):
        self.asked[name] = prompt, params
        self.going[name] = []

    def step(self):
        outputs = []
        for name, ids in list(self.going.items()):
            params = self.asked[name][1]
            stops = name == "1" and len(ids) == 1
            ids.append(1 if stops else 10 + len(ids))
            reason = "stop" if stops else "length" if len(ids) == params.max_tokens else None
            if reason:
                del self.going[name]
            if reason or params.output_kind == DELTA:
                outputs.append(Output(name, [self.tokens(ids, params, reason)], reason is not None))
        return outputs

    def tokens(self, ids, params, reason):
        shown = ids[-1:] if params.output_kind == DELTA else ids
        first = len(ids) - len(shown)
        flat = SimpleNamespace(logprobs=[-float(first + place) for place in range(len(shown))])
        return Tokens(list(shown), flat if params.logprobs == 0 else None, reason)

    def abort_request(self, names):
        for name in names:
            del self.going[name]

    @property
    def output_processor(self):
        states = {
            f"{name}-0": SimpleNamespace(external_req_id=name, detokenizer=Counted(len(ids)))
            for name, ids in self.going.items()
        }
        return SimpleNamespace(request_states=states)


@dataclass
class Counted:
    tokens: int

    def num_output_tokens(self):
        return self.tokens


@pytest.fixture
def engine(monkeypatch):
    kinds = SimpleNamespace(DELTA=DELTA, FINAL_ONLY=FINAL)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=Params))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", SimpleNamespace(RequestOutputKind=kinds))
    return FakeEngine()


def generated(engine, turn=lambda: 5, **changes):
    sampling = Sampling(**{name: getattr(SAMPLING, name) for name in Sampling.__slots__} | changes)
    made = VllmEngine(SimpleNamespace(llm_engine=engine))
    return made.generate([[3, 4], [5]], [7, 8], sampling, turn)


@pytest.mark.parametrize("steady", [True, False])
def test_rows_are_the_same_whether_they_are_told_of_at_their_end_or_at_each_step(engine, steady):
    samples = generated(engine, steady=steady)
    assert [sample.ids.tolist() for sample in samples] == [[10, 1]] + [[10, 11, 12]] * 3
    assert [sample.logprobs.tolist() for sample in samples] == [[0, -1]] + [[0, -1, -2]] * 3
    assert [sample.versions.tolist() for sample in samples] == [[5] * 2] + [[5] * 3] * 3
    assert [sample.finish_reason for sample in samples] == ["stop"] + ["length"] * 3
    assert {params.output_kind for _, params in engine.asked.values()} == {FINAL if steady else DELTA}
    assert engine.going == {}


def test_each_row_has_a_request_with_its_own_seed_and_the_salt_of_its_version(engine):
    generated(engine)
    prompts, params = zip(*engine.asked.values(), strict=True)
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [[3, 4], [3, 4], [5], [5]]
    assert {prompt["cache_salt"] for prompt in prompts} == {"5"}
    assert [each.seed for each in params] == [seed_of(seed, index) for seed in (7, 8) for index in (0, 1)]
    assert {(each.max_tokens, each.temperature, each.ignore_eos) for each in params} == {(3, 0.7, True)}


def test_what_is_cut_off_is_told_and_nothing_else_is(engine):
    generated(engine, cut=Cut(top_p=0.9, top_k=5))
    for _, params in engine.asked.values():
        assert (params.top_p, params.top_k, hasattr(params, "min_p")) == (0.9, 5, False)
    engine.asked.clear()
    generated(engine)
    assert not any(hasattr(params, "top_p") for _, params in engine.asked.values())


def test_log_probs_are_asked_of_the_rows_that_are_to_have_them(engine):
    samples = generated(engine, with_logprobs=frozenset({2}), steady=True)
    assert [params.logprobs for _, params in engine.asked.values()] == [None, None, 0, None]
    assert [sample.logprobs is not None for sample in samples] == [False, False, True, False]
    assert samples[2].logprobs.tolist() == [0, -1, -2]


@pytest.mark.parametrize("uncut", [True, False])
def test_tokens_have_the_version_of_their_own_step(engine, uncut):
    turns = iter([5, 5, 6, 6])
    samples = generated(engine, lambda: next(turns), uncut=uncut)
    assert [sample.versions.tolist() for sample in samples] == [[5, 6]] + [[5, 6, 6]] * 3
    assert [sample.ids.tolist() for sample in samples] == [[10, 1]] + [[10, 11, 12]] * 3
    assert [sample.logprobs.tolist() for sample in samples] == [[0, -1]] + [[0, -1, -2]] * 3
    assert {params.output_kind for _, params in engine.asked.values()} == {FINAL if uncut else DELTA}


@pytest.mark.parametrize("steady", [True, False])
def test_a_completion_that_is_told_to_end_has_aborted_rows(engine, steady):
    turns = iter([5, 5])
    samples = generated(engine, lambda: next(turns, None), steady=steady)
    assert {sample.finish_reason for sample in samples} == {"abort"} and engine.going == {}
    assert {len(sample.ids) for sample in samples} == {0 if steady else 1}


def test_the_parts_of_a_start_are_one_line():
    started = Started()
    started.did("import vllm")
    started.did("vllm.LLM")
    assert str(started) == "started in 0.0 s: import vllm 0.0 s, vllm.LLM 0.0 s"

"""A policy whose rows would not have the same bits in every batch is refused before it is trained."""

import pytest
from transformers import LlamaForCausalLM

from rlhf.preflight.invariance import check_invariance
from rlhf.shell.ending import RunError
from tests.benchmarks.tiny_families import tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "lfm2"])
def test_a_policy_that_keeps_the_promise_is_as_it_was(family):
    model = tiny(family)
    check_invariance(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_policy_whose_rows_see_each_other_is_refused_in_one_line():
    class Seeing(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits + 1e-6 * output.logits.mean(0, keepdim=True)
            return output

        forward.__wrapped__ = LlamaForCausalLM.forward  # whose arguments are looked at

    model = tiny("llama")
    model.__class__ = Seeing
    with pytest.raises(ValueError, match=r"with Seeing .*\(rollout\.batch_invariant=false\)") as caught:
        check_invariance(model)
    assert "\n" not in str(caught.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_that_wants_it_asks_before_it_trains(compose_run, tmp_path):
    from rlhf.run import run

    config = compose_run("experiment=smoke", "transfer=local", "rollout.batch_invariant=true", "threads=2")
    with pytest.raises((ValueError, RunError), match=r"set threads=1 \(got 2\)"):
        run(config, tmp_path / "run", ())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_did_not_ask_for_it_goes_on_without_it(compose_run, tmp_path, monkeypatch, capfd):
    from rlhf.assembly import matter
    from rlhf.run import run

    def refused(policy, threads):
        raise ValueError("a row's last bits depend on the rows beside it")

    monkeypatch.setattr(matter, "check_invariance", refused)
    ahead = ("rollout.ahead.lag=1", "algo.correction=tis", "steps=1", "sft.steps=2", "logger=[jsonl,console]")
    config = compose_run("experiment=smoke", *ahead)
    run(config, tmp_path / "run", ())
    assert config.rollout.batch_invariant is False and "warning: a row's last bits" in capfd.readouterr().out

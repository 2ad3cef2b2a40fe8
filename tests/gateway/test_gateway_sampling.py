"""Calls on their way to the workers: none is lost, whenever it comes, and a worker that fails is told of."""

from __future__ import annotations

import pytest

from rlhf.gateway.calls import Wanted
from rlhf.gateway.sampling import Sampling
from transfer.agreement.wire import RemoteError


def wanted(seed, **more):
    return Wanted(
        **{"prompt": [3, 4, 5], "seed": seed, "first": 0, "n": 1, "temperature": 0.7, "most": 4, **more}, stop=()
    )


def answers(sampling, futures):
    while not all(future.done() for future in futures):
        sampling.go_on(0.5)
    return [future.result() for future in futures]


def test_a_call_that_comes_while_others_are_handed_out_is_answered(client):
    sampling = Sampling(client)
    first = sampling.ask(wanted(1))
    sampling.tell(sampling._hand_out)
    second = sampling.ask(wanted(2))
    told = answers(sampling, [first, second])
    assert [len(each) for each in told] == [1, 1] and told[0][0].ids != told[1][0].ids


def test_calls_of_different_lengths_and_counts_are_told_apart(client):
    sampling = Sampling(client)
    many, short = answers(sampling, [sampling.ask(wanted(1, n=3)), sampling.ask(wanted(1, most=1))])
    assert len(many) == 3 and len({each.ids.tobytes() for each in many}) > 1
    assert short[0].ids == many[0].ids[:1], "the same seed, and the first sample"


def test_a_call_that_nobody_waits_for_any_more_is_not_asked(client):
    sampling = Sampling(client)
    gone, other = sampling.ask(wanted(1)), sampling.ask(wanted(2))
    assert gone.cancel()
    answers(sampling, [other])
    assert gone.cancelled()


def test_a_worker_that_cannot_be_brought_back_ends_the_step(client, monkeypatch):
    def dead(*_, **__):
        raise RemoteError("worker 0", "completions", 0, "gone")

    monkeypatch.setattr(client.senders[0], "call", dead)
    sampling = Sampling(client)
    future = sampling.ask(wanted(1))
    with pytest.raises(RemoteError, match="gone"):
        answers(sampling, [future])

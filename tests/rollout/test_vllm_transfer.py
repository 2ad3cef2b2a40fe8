"""Workers that sleep while the trainer learns, whose GPUs may be those of any of its ranks."""

from types import SimpleNamespace

import torch

from rlhf.rollout.vllm_transfer import SleepingTransfer


def of_rank(first, monkeypatch):
    """A transfer around nothing, and what happens in its rank, in order."""
    happened = []

    def noting(name, gives=None):
        return lambda *arguments: happened.append(name) or gives

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", noting("memory given back"))
    inner = SimpleNamespace(push=noting("pushed", 7), withdraw=noting("withdrawn"))
    sender = SimpleNamespace(call=lambda verb, body: happened.append(f"{verb} {body.get('tags', body.get('level'))}"))
    ranks = SimpleNamespace(gathered=noting("all are there"))
    return SleepingTransfer(inner, [sender] if first else [], 1, ranks), happened


def test_no_rank_learns_before_the_workers_sleep_and_none_wakes_before_all_ranks_have_made_room(monkeypatch):
    transfer, happened = of_rank(True, monkeypatch)
    transfer.withdraw()
    assert happened == ["withdrawn", "sleep 1", "all are there"]
    happened.clear()
    assert transfer.push({}) == 7
    assert happened == [
        *("memory given back", "all are there", "wake_up ['weights']", "pushed", "wake_up ['kv_cache']"),
    ]


def test_the_other_ranks_take_part_without_a_worker(monkeypatch):
    transfer, happened = of_rank(False, monkeypatch)
    transfer.withdraw()
    transfer.push({})
    assert happened == ["withdrawn", "all are there", "memory given back", "all are there", "pushed"]

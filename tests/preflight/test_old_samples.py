"""Objectives that hardly bound what much older weights have sampled are named before the run, with the key."""

from __future__ import annotations

import pytest

from rlhf.preflight.old_samples import hardly_bounded

REINFORCE = "algo.loss=reinforce updates_per_step=4"
LOOSE = "algo.correction_high=100"


def said(compose_run, lag: int, overrides: str) -> list[str]:
    ahead = f"rollout.ahead.order=free rollout.ahead.lag={lag} algo.correction=tis" if lag else ""
    config = compose_run(*ahead.split(), *overrides.split())
    return list(hardly_bounded(config))


@pytest.mark.parametrize(
    ("overrides", "key"), [(REINFORCE, "choose algo.loss=clip"), (LOOSE, "algo.correction_high=100 hardly bounds")]
)
@pytest.mark.parametrize("correction", ["tis", "icepop", "sequence"])
def test_what_hardly_bounds_old_samples_is_one_line_with_the_key(compose_run, overrides, key, correction):
    (line,) = said(compose_run, 4, f"{overrides} algo.correction={correction}")
    assert line.startswith("warning: samples are up to 4 versions old") and key in line and "\n" not in line


@pytest.mark.parametrize(
    ("lag", "overrides"),
    [
        (0, f"{REINFORCE} {LOOSE}"),
        (1, f"{REINFORCE} {LOOSE}"),
        (8, ""),
        (8, "algo.loss=reinforce algo.correction=tis"),
        (8, "updates_per_step=4 algo.correction=tis"),
        (8, "algo=cispo algo.correction=tis"),
        (8, "algo.correction_high=10"),
        (0, "algo=dpo"),
    ],
)
def test_nothing_is_said_of_what_is_bounded_or_hardly_old(compose_run, lag, overrides):
    assert said(compose_run, lag, overrides) == []


def test_both_are_said_where_both_are_so(compose_run):
    assert len(said(compose_run, 2, f"{REINFORCE} {LOOSE}")) == 2

"""Forked ranks that the tests of a file share."""

from __future__ import annotations

import pytest
from forked_ranks import pool


@pytest.fixture(scope="module")
def two():
    with pool(2) as made:
        yield made


@pytest.fixture(scope="module")
def three():
    with pool(3) as made:
        yield made

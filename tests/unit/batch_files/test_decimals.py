"""Numbers as people wrote them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.batch_files.decimals import exact, exceeds


def test_a_number_is_what_its_text_says() -> None:
    assert exact(0.29) == Fraction(29, 100)
    assert exact(1e-05) == Fraction(1, 100_000)
    assert exact(2) == 2


@pytest.mark.parametrize(
    ("part", "total", "rate", "expected"),
    [
        (29, 100, 0.29, False),
        (30, 100, 0.29, True),
        (0, 0, 0, False),
        (1, 10**9, 0, True),
        (7, 7, 1, False),
        (57, 100, 0.57, False),
    ],
)
def test_a_share_that_is_reached_is_not_exceeded(part: int, total: int, rate: float, expected: bool) -> None:
    assert exceeds(part, total, rate) is expected


@given(st.integers(0, 10**4), st.integers(1, 4))
def test_every_share_written_in_decimals_is_met_exactly(part: int, digits: int) -> None:
    rate = part / 10**4
    assert not exceeds(part * digits, 10**4 * digits, rate)
    assert exceeds(part * digits + 1, 10**4 * digits, rate)

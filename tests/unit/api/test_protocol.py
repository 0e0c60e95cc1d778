"""The protocol without a network: what is sent, what is sent again, and how a list is walked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import (
    AuthenticationError,
    InsufficientBalanceError,
    InvalidInputError,
    InvalidRequestError,
    NoAnswerError,
    NotFoundError,
    NotSentError,
    RateLimitedError,
    ServiceUnavailableError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Batch
from airflow_provider_siliconflow.api.protocol import BatchListing, Call, Page
from airflow_provider_siliconflow.api.settings import ClientSettings

SETTINGS = ClientSettings("sk-secret-key")

# Repetition -------------------------------------------------------------------------------------------------


def test_backoff_doubles_up_to_its_limit() -> None:
    delays = [protocol.backoff_delay(attempt, None, base=1, limit=30) for attempt in (1, 2, 3, 50, 5000)]
    for delay, middle in zip(delays, (1, 2, 4, 30, 30), strict=True):
        assert 0.8 * middle <= delay <= 1.2 * middle


@pytest.mark.parametrize(
    ("error", "no_effect", "transient"),
    [
        (NotSentError("x"), True, True),
        (RateLimitedError("x", status_code=429), True, True),
        (ServiceUnavailableError("System is overloaded", status_code=503), False, True),
        (ServiceUnavailableError("x", status_code=503, code="50603"), True, True),
        (ServiceUnavailableError("x", status_code=503), False, True),
        (ServiceUnavailableError("overloaded", status_code=502), False, True),
        (NoAnswerError("x"), False, True),
        (UnexpectedAnswerError("x"), False, True),
        (InvalidRequestError("x", status_code=400), False, False),
        (AuthenticationError("x", status_code=401), False, False),
        (InsufficientBalanceError("x", status_code=402), False, False),
        (InvalidInputError("x"), False, False),
    ],
)
def test_what_is_worth_another_try(error: Exception, no_effect: bool, transient: bool) -> None:
    assert (protocol.had_no_effect(error), protocol.is_transient(error)) == (no_effect, transient)
    assert protocol.leaves_effect_open(error) == (transient and not no_effect)


def test_an_id_stays_one_part_of_the_path() -> None:
    assert protocol.get_batch("a/b?c#d").url(SETTINGS) == f"{SETTINGS.base_url}/batches/a%2Fb%3Fc%23d"


# Listing ----------------------------------------------------------------------------------------------------


def page_of(*numbers: int, more: bool | None = None) -> Page[Batch]:
    return Page(tuple(Batch(id=f"batch_{n}", status="completed") for n in numbers), has_more=more)


def listing_of(*pages: Page[Batch] | Exception) -> tuple[BatchListing, list[Any]]:
    """A listing over these pages, of which the last repeats for ever; and the cursors it asks with."""
    cursors: list[Any] = []

    def fetch(call: Call[Page[Batch]]) -> Page[Batch]:
        cursors.append(call.query.get("after"))
        page = pages[min(len(cursors), len(pages)) - 1]
        if isinstance(page, Exception):
            raise page
        return page

    return BatchListing(fetch), cursors


@given(
    pages=st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=6),
    more=st.sampled_from([True, False, None]),
)
def test_a_listing_ends_and_yields_each_batch_once(pages: list[list[int]], more: bool | None) -> None:
    """Whatever the pages repeat and claim, and though the last one repeats for ever."""
    listing, cursors = listing_of(*(page_of(*numbers, more=more) for numbers in pages))
    found = [batch.id for batch in listing]
    assert len(found) == len(set(found))
    assert len(cursors) == 1 or more is not False
    assert len(cursors) <= 10


@pytest.mark.parametrize(
    ("pages", "asked", "cut"),
    [
        ([page_of(2, 1, more=False)], [None], False),
        ([page_of(2, 1, more=True), page_of(0, more=False)], [None, "batch_1"], False),
        ([page_of(2, 1, more=True)], [None, "batch_1"], True),
        # It says nothing of further pages: the next one tells.
        ([page_of(2, 1), page_of()], [None, "batch_1"], False),
        ([page_of(2, 1)], [None, "batch_1"], True),
        ([page_of()], [None], False),
        ([page_of(more=True)], [None], True),
        ([page_of(2, 1, more=True), InvalidRequestError("no", status_code=400)], [None, "batch_1"], True),
        ([page_of(2, 1, more=True), NotFoundError("no", status_code=404)], [None, "batch_1"], True),
    ],
)  # fmt: skip
def test_when_a_listing_is_cut(pages: list[Any], asked: list[Any], cut: bool) -> None:
    listing, cursors = listing_of(*pages)
    list(listing)
    assert (cursors, listing.cut) == (asked, cut)


def test_a_listing_that_is_refused_or_broken_off_is_not_a_whole_one() -> None:
    listing, _ = listing_of(InvalidRequestError("no", status_code=400))
    with pytest.raises(InvalidRequestError):
        list(listing)
    assert listing.cut
    assert list(listing) == []
    assert listing.cut
    listing, _ = listing_of(page_of(2, 1, more=False))
    next(listing)
    assert listing.cut


@pytest.mark.parametrize("limit", ["MAX_PAGES", "MAX_LISTED"])
def test_a_listing_without_end_is_cut(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(protocol, limit, 7)
    numbers = iter(range(10**9))
    endless: Callable[..., Page[Batch]] = lambda call: page_of(next(numbers), more=True)  # noqa: E731
    listing = BatchListing(endless)
    assert len(list(listing)) == 7
    assert listing.cut

"""Errors: the tree, and that each travels between processes as it is."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable

import pytest

from airflow_provider_siliconflow.api import exceptions
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    BatchError,
    InvalidRequestFileError,
    LineProblem,
    SiliconFlowError,
    TransportError,
)

CLASSES = [
    value
    for value in vars(exceptions).values()
    if inspect.isclass(value) and issubclass(value, SiliconFlowError)
]


def build(kind: type[SiliconFlowError], retryable: bool | None) -> SiliconFlowError:
    """Return an error with every attribute its class has set to something of its own."""
    if issubclass(kind, APIError):
        return kind(
            "Model does not exist",
            status_code=418,
            code="20012",
            trace_id="ti_1",
            retry_after=3.5,
            call="POST /batches",
            retryable=retryable,
        )
    if issubclass(kind, BatchError):
        return kind("what happened", batch_id="batch_1", retryable=retryable)
    if issubclass(kind, InvalidRequestFileError):
        problems = [LineProblem(3, "no messages", "row-3"), LineProblem(4, "no body")]
        return kind("rows.jsonl", problems, more=True, retryable=retryable)
    if issubclass(kind, TransportError):
        return kind("what happened", accepted=True, retryable=retryable)
    return kind("what happened", retryable=retryable)


@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("retryable", [None, True, False])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_travels_whole(
    kind: type[SiliconFlowError],
    retryable: bool | None,
    travel: Callable[[SiliconFlowError], SiliconFlowError],
) -> None:
    error = build(kind, retryable)
    error.add_note("the first note")

    found = travel(error)

    assert type(found) is kind
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    assert found.retryable is (kind.retryable if retryable is None else retryable)
    found.add_note("the second note")
    assert error.__notes__ == ["the first note"]


def test_one_error_differs_from_its_class_alone() -> None:
    build(BatchError, retryable=False)
    assert BatchError("another").retryable
    assert BatchError.retryable


def test_the_tree_at_the_top_of_the_module_is_the_tree() -> None:
    drawn: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (exceptions.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:[ |+']*)?)([A-Z]\w+Error)\b", line):
            depth, name = len(found[1]), found[2]
            while above and above[-1][0] >= depth:
                above.pop()
            drawn[name] = above[-1][1] if above else None
            above.append((depth, name))
    real = {
        kind.__name__: None if kind is SiliconFlowError else str(kind.__bases__[0].__name__)
        for kind in CLASSES
    }
    assert drawn == real

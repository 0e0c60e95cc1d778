"""Arguments: what the service takes, and errors that name the argument."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from airflow_provider_siliconflow.api import arguments
from airflow_provider_siliconflow.api.exceptions import InvalidInputError


@pytest.mark.parametrize(
    ("value", "window"),
    [("24h", "24h"), (24, "24h"), (" 336 h ", "336h"), ("48", "48h"), (timedelta(days=14), "336h")],
)
def test_completion_window(value: Any, window: str) -> None:
    assert arguments.check_completion_window(value) == window


@pytest.mark.parametrize(
    "value",
    ["23h", 337, "1d", "", None, True, 24.0, "24.5h", "-24h", timedelta(hours=24, minutes=1), timedelta(0)],
)
def test_completion_window_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="completion_window"):
        arguments.check_completion_window(value)


def test_metadata_at_its_limits() -> None:
    fits = {f"{n:02d}" + "k" * 62: "v" * 512 for n in range(16)}
    assert arguments.check_metadata(fits) == fits
    assert arguments.check_metadata(None) == {}


@pytest.mark.parametrize(
    "value",
    [
        {str(n): "" for n in range(17)},
        {"k" * 65: ""},
        {"": ""},
        {"k": "v" * 513},
        {"k": 1},
        {"k": "\ud800"},
        {"\ud800": "v"},
        {1: "v"},
        ["k"],
        "k=v",
    ],
)
def test_metadata_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="metadata"):
        arguments.check_metadata(value)


@pytest.mark.parametrize(
    "value",
    [
        "Qwen/Qwen3-32B",
        ["m"],
        {"model": ""},
        {"model": None},
        {"model": 3},
        {"model": "\ud800"},
        {1: 2},
        {"t": {1, 2}},
    ],
)
def test_replace_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="replace"):
        arguments.check_replace(value)


@pytest.mark.parametrize("value", [None, "", "  ", "None", "null", 7, ["a"]])
def test_an_id_that_is_none(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="input_file_id"):
        arguments.check_identifier("input_file_id", value)


def test_several_ids() -> None:
    assert arguments.check_identifiers("batch_id", ["b", " a", "b"]) == ["b", "a"]
    assert arguments.check_identifiers("batch_id", "a") == ["a"]
    with pytest.raises(InvalidInputError, match="batch_id"):
        arguments.check_identifiers("batch_id", [])

"""One job over several models, of which some get body parameters of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.emulator.server import Emulator
from tests.unit.jobs.test_cache import CachingJob
from tests.unit.jobs.whole_job import MODELS, Job, options, posts, results, rows

pytestmark = pytest.mark.emulator(speed=2000.0)

THIRD = "deepseek-ai/DeepSeek-V3"
PARAMS: dict[str, Any] = {
    MODELS[0]: {"max_tokens": 50, "temperature": 0.5},
    MODELS[1]: {},
    THIRD: {"temperature": 0.5, "max_tokens": 50},
}


def sent(emulator: Emulator) -> dict[str, list[dict[str, Any]]]:
    """Return the bodies that were sent to each model, without their messages."""
    service = emulator.service
    found: dict[str, list[dict[str, Any]]] = {}
    for batch in service.state()["batches"]:
        for line in service.open_content(batch["input_file_id"]).read_bytes().splitlines():
            body = {name: value for name, value in json.loads(line)["body"].items() if name != "messages"}
            found.setdefault(batch["request"]["replace"]["model"], []).append(body)
    return found


def test_each_model_gets_its_parameters_over_one_upload_for_each_set(
    emulator: Emulator, tmp_path: Path
) -> None:
    given_rows: list[dict[str, Any]] = rows(7, lambda i: "[[emulator:once=503]]" if i == 4 else "")
    given_rows[2]["max_tokens"] = 9
    job = Job(
        emulator, tmp_path, given_rows, models=PARAMS, request_params={"max_tokens": 20}, max_row_attempts=2
    )
    manifest = job.attempt()
    assert manifest["rows"]["ok"] == 21
    own, common = {"max_tokens": 50, "temperature": 0.5}, {"max_tokens": 20}
    for model, expected in ((MODELS[0], own), (MODELS[1], common), (THIRD, own)):
        bodies = sent(emulator)[model]
        # The row's own parameter wins; the row that failed is sent again with the same.
        assert bodies == [expected if i != 2 else {**expected, "max_tokens": 9} for i in (*range(7), 4)]
        assert [row["custom_id"] for row in results(tmp_path, model)] == [f"q{i}" for i in range(7)]
    # Two shards in two variants; then one row for each model.
    assert posts(emulator)[0] == 4 + 2
    job.clear()
    assert job.attempt() == manifest
    job.clear()
    job.options = options(
        models={**PARAMS, THIRD: {"temperature": 0.7}}, request_params={"max_tokens": 20}, max_row_attempts=2
    )
    before = posts(emulator)[1]
    assert job.attempt()["rows"]["ok"] == 21
    assert posts(emulator)[1] > before, "a changed parameter is new work"


def test_cached_answers_are_those_to_the_same_parameters(emulator: Emulator, tmp_path: Path) -> None:
    def night(number: int, params: dict[str, Any]) -> dict[str, Any]:
        job = CachingJob(emulator, tmp_path / str(number), tmp_path / "cache", rows(7), models=params)
        return job.attempt()

    night(0, PARAMS)
    assert night(1, PARAMS)["cached"]["rows"] == 21
    # Without a mapping, bodies are as those of the model that got nothing.
    plain = night(2, {model: {} for model in PARAMS})
    assert [each["cached"]["rows"] for each in plain["models"]] == [0, 7, 0]


@given(
    params=st.lists(
        st.dictionaries(st.sampled_from(["max_tokens", "seed", "n"]), st.integers(1, 9)),
        min_size=1,
        max_size=3,
    ),
    request_params=st.dictionaries(st.sampled_from(["max_tokens", "seed", "top_k"]), st.integers(1, 9)),
)
def test_what_a_model_gets_is_its_own_before_that_of_all(
    params: list[dict[str, int]], request_params: dict[str, int]
) -> None:
    found = options(
        models={f"m{number}": each for number, each in enumerate(params)}, request_params=request_params
    )
    for number, own in enumerate(params):
        variant = found.variants[number] if found.variants else {}
        assert found.body_defaults.keys().isdisjoint(variant)
        assert {**found.body_defaults, **variant} == {**request_params, **own}


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"a": ["x"]}, r"models\['a'\] must be a mapping of body parameters"),
        ({"a": {"model": "b"}}, r"models\['a'\] must not contain 'model'"),
        ({"a": {"messages": []}}, r"models\['a'\] must not contain 'messages'"),
        ({"a": {}, "A": {}}, "models names one twice"),
        ({}, "models is empty"),
        ({1: {}}, r"models\[0\] must be the name of a model"),
    ],
)
def test_wrong_mappings_are_refused(models: Any, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        options(models=models)


def test_a_shard_stays_within_its_limit_with_the_parameters(emulator: Emulator, tmp_path: Path) -> None:
    limit = 600
    job = Job(emulator, tmp_path, rows(9), models=PARAMS, max_bytes_per_batch=limit)
    job.attempt()
    service = emulator.service
    sizes = [
        len(service.open_content(batch["input_file_id"]).read_bytes()) for batch in service.state()["batches"]
    ]
    assert max(sizes) <= limit


def test_parameters_that_leave_no_room_for_a_row_are_refused_by_name(
    emulator: Emulator, tmp_path: Path
) -> None:
    job = Job(emulator, tmp_path, rows(1), models={MODELS[0]: {"stop": "x" * 300}}, max_bytes_per_batch=200)
    with pytest.raises(
        InvalidInputError, match=r"max_bytes_per_batch is 200, but .* models take up to \d+ bytes"
    ):
        job.attempt()
    assert posts(emulator) == (0, 0)

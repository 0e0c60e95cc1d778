"""Body parameters for all rows."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.parameters import check_parameters
from airflow_provider_siliconflow.batch_files.shards import split_requests
from tests.unit.batch_files.samples import USER


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (["temperature"], "request_params must be a mapping .* got list"),
        ({1: 2}, "request_params must name .* the key 1"),
        ({"messages": USER}, "request_params must not contain 'messages'"),
        ({"t": float("nan")}, r"request_params\['t'\] cannot be written as JSON"),
        ({"stop": "\ud800"}, r"request_params\['stop'\] cannot be written as JSON"),
        ({"model": 3}, r"request_params\['model'\] must be the name of a model; got 3"),
    ],
)
def test_an_error_names_the_argument_as_its_author_wrote_it(
    parameters: Any, said: str, tmp_path: Any
) -> None:
    with pytest.raises(InvalidInputError, match=said):
        check_parameters("request_params", parameters)
    with pytest.raises(InvalidInputError, match=said):
        split_requests(["x"], tmp_path, name="rows", defaults=parameters, defaults_name="request_params")

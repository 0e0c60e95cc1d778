"""What one result line says of its row."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.models import BatchResult, Outcome
from airflow_provider_siliconflow.batch_files.verdicts import (
    UnreadableLineError,
    Verdict,
    is_balance_error,
    read_result,
    read_verdict,
    worth_retrying,
)
from tests.unit.batch_files.samples import answer, failure

#: Cut characters, escapes, control characters; then what JSON is made of.
DAMAGES = (
    *(b"\xf0\x9f", b"\xed\xa0\xbd", b"\\", b"\\ud83d", b"\\x", b"\x00", b"\x1f", b"\r"),
    *(b'"', b"}", b"0", b"9" * 5000, b"1e999", b".", b"-", b",", b"NaN", b"[" * 2000),
)


@settings(max_examples=500)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 400),
            st.integers(0, 2),
            st.sampled_from(DAMAGES) | st.binary(max_size=2),
        ),
        max_size=3,
    ),
    st.sampled_from(
        [
            *(answer("a", text, n=[1, {"k": 1.5}]) for text in ("yes", "x" * 90, None)),
            failure("a", "batch_expired", "the window ended"),
            failure("a", 20000, "Ok"),
        ]
    ),
)
def test_a_damaged_line_is_judged_as_it_is_read_or_not_at_all(damages: Any, whole: Any) -> None:
    """Otherwise a file of results would hold lines that its reader refuses."""
    line = json.dumps(whole).encode()
    for at, gone, put in damages:
        line = line[:at] + put.replace(b"\n", b"") + line[at + gone :]

    def outcome(read: Callable[[bytes], Any]) -> Any:
        try:
            found = read(line)
        except UnreadableLineError:
            return "unreadable"
        return found and (found.custom_id, found.outcome)

    assert outcome(read_verdict) == outcome(read_result)


def judged(line: Any) -> Verdict:
    verdict = read_verdict(line if isinstance(line, bytes) else json.dumps(line).encode())
    assert verdict is not None
    return verdict


def test_a_message_that_repeats_its_prompt_is_not_kept_whole() -> None:
    said = "x" * 100_000
    for line in (
        failure("a", said, said),
        {"custom_id": "a", "response": {"status_code": 400, "body": said}},
        {"custom_id": "a", "response": {"body": {"error": {"code": said, "message": said}}}},
        {"custom_id": "a", "error": [said]},
    ):
        message = judged(line).message
        assert message
        assert len(message) <= 300


def test_the_same_failure_of_many_rows_is_that_of_each() -> None:
    expired = [judged(failure(name, "batch_expired", "too late")) for name in "ab"]
    assert [(each.custom_id, each.outcome, each.transient) for each in expired] == [
        ("a", Outcome.EXPIRED, True),
        ("b", Outcome.EXPIRED, True),
    ]
    assert expired[0] is not expired[1]
    poor = judged(failure("a", "30001", "Sorry, your account balance is insufficient"))
    assert (poor.out_of_balance, poor.transient, poor.code) == (True, False, "30001")


def test_an_answer_says_whether_it_counts_its_tokens() -> None:
    for usage in (
        {"prompt_tokens": 1},
        {"completion_tokens": 1},
        {},
        None,
        {"prompt_tokens": -1, "completion_tokens": 1},
    ):
        line = answer("a")
        line["response"]["body"]["usage"] = usage
        assert not judged(line).metered
    assert judged(answer("a", usage=(0, 0))).metered
    assert judged(answer("a", usage=(10.0, 2))).metered


loose = st.none() | st.booleans() | st.integers(0, 600) | st.sampled_from(["", " ", "x", "200", 200.0, 0.5])


odd_lines = st.fixed_dictionaries(
    {
        "custom_id": st.just("a"),
        "error": st.none() | loose | st.fixed_dictionaries({}, optional={"code": loose, "message": loose}),
        "response": loose
        | st.fixed_dictionaries(
            {},
            optional={
                "status_code": loose,
                "body": loose
                | st.fixed_dictionaries(
                    {},
                    optional={
                        "model": loose,
                        "choices": loose
                        | st.lists(
                            st.just({})
                            | loose
                            | st.fixed_dictionaries(
                                {"message": loose | st.fixed_dictionaries({}, optional={"content": loose})},
                                optional={"finish_reason": loose},
                            ),
                            max_size=2,
                        ),
                        "usage": loose
                        | st.fixed_dictionaries(
                            {},
                            optional={
                                "prompt_tokens": loose,
                                "completion_tokens_details": loose | st.just({"reasoning_tokens": 1}),
                                "prompt_tokens_details": loose
                                | st.fixed_dictionaries({"cached_tokens": loose}),
                            },
                        ),
                    },
                ),
            },
        ),
    }
)


@settings(max_examples=500)
@given(odd_lines)
def test_a_line_of_any_shape_is_judged_as_the_model_judges_it(data: Any) -> None:
    verdict = read_verdict(json.dumps(data).encode())
    assert verdict is not None
    response = data["response"]
    data = {**data, "response": response if isinstance(response, dict) else None}
    expected = BatchResult.model_validate(data)
    assert verdict.outcome == expected.outcome
    if verdict.outcome is Outcome.OK:
        reason = expected.finish_reason
        assert verdict.finish_reason == (reason if isinstance(reason, str) else None)
        prompt = expected.usage.get("prompt_tokens")
        assert verdict.prompt == (prompt if type(prompt) is int else 200 if prompt in ("200", 200.0) else 0)
        text = expected.text
        assert verdict.empty == (not (text.strip() if isinstance(text, str) else text))
    else:
        assert verdict.message is not None


@pytest.mark.parametrize(
    ("code", "message", "status", "expected"),
    [
        ("429", "x", None, True),
        ("50505", "Model service overloaded. Please try again later.", None, True),
        ("50603", "x", None, True),
        (None, "Request was rejected due to rate limiting. Details: TPM limit reached.", None, True),
        ("rate_limit_exceeded", None, None, True),
        ("internal_error", None, None, True),
        (None, "Request timed out", None, True),
        (None, "x", 503, True),
        (None, "x", 408, True),
        (None, "Please try again", 400, False),
        ("400", "server busy parsing your request", None, False),
        ("20012", "Model does not exist. Please check it carefully.", None, False),
        ("20015", "invalid parameter: timeout", None, False),
        ("invalid_request_error", "timeout must be positive", None, False),
        ("30001", "Sorry, your account balance is insufficient", 500, False),
        ("30003", "Model disabled.", None, False),
        (None, "Invalid value for timeout", None, False),
        (None, "something odd", None, False),
        (None, None, None, False),
    ],
)
def test_only_transient_failures_are_worth_a_retry(
    code: Any, message: Any, status: Any, expected: Any
) -> None:
    assert worth_retrying(Outcome.ERROR, code=code, message=message, status=status) is expected


def test_balance_errors_are_known_by_code_status_or_words() -> None:
    assert is_balance_error(code="30001")
    assert is_balance_error(status=402)
    assert is_balance_error(message="Insufficient account balance")
    assert not is_balance_error(code="429", message="load balancer busy", status=429)

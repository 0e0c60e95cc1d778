"""The models against every form in which the service is known to send things."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.exceptions import UnexpectedAnswerError
from airflow_provider_siliconflow.api.models import Batch, BatchResult, Outcome
from airflow_provider_siliconflow.api.settings import ClientSettings

SETTINGS = ClientSettings("sk-test-key")
SIGNED = "https://bucket.storage.example/results/out.jsonl?X-Amz-Credential=abc&X-Amz-Signature=SECRET"

#: The documented answer of POST /batches, word for word.
CREATED = json.loads(
    '{"id":"batch_rdyqgrcgjg","object":"batch","endpoint":"/v1/chat/completions","errors":null,'
    '"input_file_id":"file-jkvytbjtow","completion_window":"24h","status":"in_queue",'
    '"output_file_id":null,"error_file_id":null,"created_at":1741685413,"in_progress_at":null,'
    '"expires_at":1741771813,"finalizing_at":null,"completed_at":null,"failed_at":null,"expired_at":null,'
    '"cancelling_at":null,"cancelled_at":null,"request_counts":null,'
    '"metadata":{"description":"nightly eval job"}}'
)


def read(call: protocol.Call[Any], answer: Any) -> Any:
    return call.answer(200, {}, json.dumps(answer).encode())


def batch_with(**fields: Any) -> Batch:
    batch: Batch = read(protocol.get_batch("batch_rdyqgrcgjg"), CREATED | fields)
    return batch


def test_documented_batch() -> None:
    batch = batch_with()
    assert (batch.id, batch.status, batch.created_at) == ("batch_rdyqgrcgjg", "in_queue", 1741685413)
    assert batch.metadata == {"description": "nightly eval job"}
    assert batch.error_messages == []
    assert not batch.is_terminal


@pytest.mark.parametrize(
    ("sent", "done"),
    [
        (None, (0, 0, 0)),
        ({}, (0, 0, 0)),
        ({"total": 0, "completed": 0, "failed": 0}, (0, 0, 0)),
        ({"total": 9, "completed": 5, "failed": 1}, (9, 5, 1)),
        ({"total": 9, "completed": None}, (9, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_request_counts(sent: Any, done: tuple[int, int, int]) -> None:
    counts = batch_with(request_counts=sent).request_counts
    assert (counts.total, counts.completed, counts.failed) == done


@pytest.mark.parametrize(
    ("sent", "messages"),
    [
        (None, []),
        ([], []),
        (["line 3: no messages"], ["line 3: no messages"]),
        ("whole file refused", ["whole file refused"]),
        ([{"code": 20015, "message": "no model", "line": 4}], ["line 4: no model (20015)"]),
        ({"object": "list", "data": [{"message": "no model"}]}, ["no model"]),
        ([{"reason": "?"}], ['{"reason": "?"}']),
        (["cut \ud83d"], ["cut \ufffd"]),
        (["x" * 5000], ["x" * 1000]),
    ],
)
def test_errors_of_a_batch(sent: Any, messages: list[str]) -> None:
    assert batch_with(errors=sent).error_messages == messages


@pytest.mark.parametrize(
    ("status", "terminal", "dead"),
    [
        ("validating", False, False),
        ("in_queue", False, False),
        ("in_progress", False, False),
        ("finalizing", False, False),
        ("cancelling", False, False),
        ("completed", True, False),
        ("expired", True, False),
        ("failed", True, True),
        ("cancelled", True, True),
        ("paused_by_admin", False, False),
        ("COMPLETED", False, False),
    ],
)
def test_status(status: str, terminal: bool, dead: bool) -> None:
    batch = batch_with(status=status)
    assert (batch.is_terminal, batch.is_dead) == (terminal, dead)
    assert batch.is_known_status == (status not in ("paused_by_admin", "COMPLETED"))


@pytest.mark.parametrize(
    "fields",
    [
        {"completed_at": "", "expires_at": "2025-03-11T09:30:13Z"},
        {"object": None, "endpoint": 7},
        {"in_progress_at": float("-inf"), "expires_at": float("nan")},
        {"metadata": [], "request_counts": []},
        {"output_file_id": {"url": "?"}},
    ],
)
def test_an_odd_field_does_not_hide_the_batch(fields: dict[str, Any]) -> None:
    batch = batch_with(status="completed", **fields)
    assert batch.is_terminal
    assert batch.input_file_id == "file-jkvytbjtow"


@pytest.mark.parametrize("id_", ["", None, True, 1.5, "a b", "a\0b", "\ud800", "..", "x" * 513, {}, 10**400])
def test_without_an_id_it_is_no_batch(id_: Any) -> None:
    with pytest.raises(UnexpectedAnswerError):
        batch_with(id=id_)


@pytest.mark.parametrize("status", ["", None, 3, [], "\0"])
def test_without_a_status_it_is_pending(status: Any) -> None:
    batch = batch_with(status=status)
    assert not batch.is_terminal
    assert not batch.is_known_status


def test_unknown_fields_are_kept_over_a_round_trip() -> None:
    batch = batch_with(priority={"level": 3})
    assert Batch.model_validate(batch.to_json_dict()).to_json_dict()["priority"] == {"level": 3}


FLAT = {"id": "file-jk", "object": "file", "bytes": 8509, "filename": "requests.jsonl", "purpose": "batch"}


@pytest.mark.parametrize(
    "answer",
    [
        {"code": 20000, "message": "Ok", "status": True, "data": FLAT | {"createdAt": 1741685396}},
        FLAT | {"created_at": 1741685396},
    ],
    ids=["enveloped", "flat"],
)
def test_uploaded_file(answer: Any) -> None:
    file = read(protocol.upload_file(), answer)
    assert (file.id, file.bytes, file.filename, file.created_at) == (
        "file-jk",
        8509,
        "requests.jsonl",
        1741685396,
    )


@pytest.mark.parametrize(
    ("answer", "ids"),
    [
        ({"code": 20000, "status": True, "data": {"data": [FLAT], "object": "file"}}, ["file-jk"]),
        ({"object": "list", "data": [FLAT, {"odd": 1}]}, ["file-jk"]),
        ({"code": 20000, "status": True, "data": {"data": None}}, []),
        ([FLAT], ["file-jk"]),
    ],
    ids=["double-wrapped", "one odd entry", "null", "bare"],
)
def test_file_listing(answer: Any, ids: list[str]) -> None:
    assert [file.id for file in read(protocol.list_files(), answer).items] == ids


@pytest.mark.parametrize("more", [True, False])
def test_a_listing_tells_whether_there_is_more_in_whichever_wrapping(more: bool) -> None:
    page = {"object": "list", "data": [CREATED], "has_more": more}
    for answer in (page, {"code": 20000, "status": True, "data": page}):
        assert read(protocol.list_batches(), answer).has_more is more


def test_an_odd_field_does_not_hide_a_file_or_an_account() -> None:
    file = read(protocol.upload_file(), FLAT | {"createdAt": "2025-03-11T00:00:00Z", "line_count": ""})
    assert (file.id, file.bytes, file.created_at) == ("file-jk", 8509, None)
    account = read(protocol.get_account(), {"id": "u", "name": None, "chargeBalance": "1"})
    assert (account.id, account.name, account.charge_balance) == ("u", "", "1")


def test_account() -> None:
    data = {"id": "userid", "name": "", "balance": 0.88, "status": "normal", "chargeBalance": "88.00"}
    account = read(protocol.get_account(), {"code": 20000, "message": "OK", "status": True, "data": data})
    assert (account.charge_balance, account.balance, account.status) == ("88.00", "0.88", "normal")


def test_a_signature_is_shown_nowhere() -> None:
    batch = batch_with(
        output_file_id=SIGNED,
        error_file_id=SIGNED,
        errors=[f"see {SIGNED}", {"message": SIGNED}],
        new_result_url=SIGNED,
        files={"output": [SIGNED.replace("https://", "https://user:SECRET@")]},
    )
    assert batch.output_file_id == SIGNED
    for shown in (repr(batch), str(batch), json.dumps(batch.to_json_dict())):
        assert "SECRET" not in shown
    assert batch.to_json_dict()["output_file_id"] == SIGNED.partition("?")[0]
    # Metadata is the author's own.
    assert batch_with(metadata={"source": SIGNED}).to_json_dict()["metadata"] == {"source": SIGNED}


def test_an_answer_that_cannot_be_read_shows_no_signature(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnexpectedAnswerError) as caught:
        read(protocol.get_batch("b"), {"name": "b", "output_file_id": SIGNED})
    # A traceback prints the cause as well.
    assert "SECRET" not in f"{caught.value}{caught.value.__cause__}"
    read(protocol.list_batches(), {"data": [{"name": "b", "output_file_id": SIGNED}]})
    assert caplog.records
    assert "SECRET" not in caplog.text


# Results ----------------------------------------------------------------------------------------------------


def completion(content: Any = "42", **choice: Any) -> dict[str, Any]:
    return {
        "choices": [{"message": {"content": content, "reasoning_content": "6 * 7"}, **choice}],
        "usage": {"total_tokens": 12},
    }


def result(**fields: Any) -> BatchResult:
    return BatchResult.model_validate_json(json.dumps({"custom_id": "request-3", **fields}))


def test_output_line() -> None:
    line = result(response={"body": completion(finish_reason="length")}, error=None, trace_id="ti_1")
    assert line.ok
    assert (line.text, line.reasoning, line.finish_reason) == ("42", "6 * 7", "length")
    assert (line.usage, line.trace_id, line.error_message) == ({"total_tokens": 12}, "ti_1", None)


def test_error_line() -> None:
    line = result(response=None, error={"code": "batch_expired", "message": "The window ended."})
    assert line.outcome is Outcome.EXPIRED
    assert (line.text, line.finish_reason, line.usage, line.body) == (None, None, {}, {})
    assert line.error_message == "The window ended. (batch_expired)"


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"response": {"status_code": 200, "body": completion()}}, Outcome.OK),
        ({"response": {"status_code": 429, "body": completion()}}, Outcome.ERROR),
        ({"response": {"body": {"choices": []}}}, Outcome.ERROR),
        ({"response": {"body": {"choices": [None]}}}, Outcome.ERROR),
        ({"response": {"body": "oops"}}, Outcome.ERROR),
        ({"response": None, "error": "plain text"}, Outcome.ERROR),
        ({"response": {"body": completion()}, "error": {"code": 20015}}, Outcome.ERROR),
        ({"response": {"body": completion()}, "error": {"code": "", "message": None}}, Outcome.OK),
        ({"response": None, "error": {"code": "", "message": ""}}, Outcome.ERROR),
        ({"response": None, "error": {"code": "missing"}}, Outcome.MISSING),
        ({}, Outcome.ERROR),
    ],
)
def test_outcome_of_a_line(fields: dict[str, Any], outcome: Outcome) -> None:
    assert result(**fields).outcome is outcome


class Answer(BaseModel):
    value: int


@pytest.mark.parametrize(
    "text", ['{"value": 42}', ' {"value": 42}\n', '```json\n{"value": 42}\n```', '```\n{"value": 42}```']
)
def test_parse(text: str) -> None:
    assert result(response={"body": completion(text)}).parse(Answer) == Answer(value=42)


def test_parse_refuses_what_is_not_there() -> None:
    with pytest.raises(ValidationError):
        result(response={"body": completion("It is 42.")}).parse(Answer)
    for content in (None, [{"type": "text"}]):
        with pytest.raises(ValueError, match="'request-3' has no text"):
            result(response={"body": completion(content)}).parse(Answer)

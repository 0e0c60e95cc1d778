"""Answers in forms nobody documents: none pays twice, ends a wait by mistake, or hides a batch in a list."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import pytest

from airflow_provider_siliconflow.api import protocol
from airflow_provider_siliconflow.api.client import SiliconFlowClient
from airflow_provider_siliconflow.api.exceptions import (
    APIError,
    InvalidRequestError,
    NoAnswerError,
    SiliconFlowError,
    TransportError,
    UnexpectedAnswerError,
)
from airflow_provider_siliconflow.api.models import Batch, BatchResult, Outcome, UploadedFile
from tests.unit.boundary.hostile import (
    BATCH,
    Ask,
    Server,
    answer,
    ask_sync,
    creation,
    make_settings,
    serving,
)

pytestmark = pytest.mark.usefixtures("no_proxies")

# POST /batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 206, 299])
@pytest.mark.parametrize(
    ("body", "id_"),
    [
        (BATCH, "batch_1"),
        ({"id": "batch_1"}, "batch_1"),
        ({"id": 41}, "41"),
        ({"batch_id": "batch_1", "status": None}, "batch_1"),
        ({"code": 20000, "message": "Ok", "status": True, "data": BATCH}, "batch_1"),
        ({"code": 0, "data": [BATCH]}, "batch_1"),
        ({"data": {"data": {"id": "batch_1"}}}, "batch_1"),
        ([BATCH], "batch_1"),
        (
            {"id": "batch_1", "status": 3, "created_at": "today", "request_counts": 7, "metadata": "x"},
            "batch_1",
        ),
        ({"id": "batch_1", "error": {"code": 500, "message": "no"}}, "batch_1"),
    ],
)
def test_an_answer_that_names_a_batch_is_one(ask: Ask, status: int, body: Any, id_: str) -> None:
    with serving(answer(body, status)) as server:
        batch: Batch = ask(make_settings(server.url), creation())
    assert batch.id == id_
    assert not batch.is_terminal


@pytest.mark.parametrize("status", [409, 429, 500, 503])
def test_a_batch_is_read_under_whichever_status(ask: Ask, status: int) -> None:
    with serving(answer(BATCH, status)) as server:
        assert ask(make_settings(server.url), creation()).id == "batch_1"


@pytest.mark.parametrize("status", [200, 201, 202])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b"7",
        b'"ok"',
        b"<html>login</html>",
        b'{"id": "batch_1", "sta',
        b'{"id": null}',
        b'{"id": {"a": 1}}',
        b'{"id": "a b"}',
        b'{"data": null}',
        b'{"data": {}}',
        b'[{"id": "batch_1"}, {"id": "batch_2"}]',
        b"\xff\xfe",
        # In words it is busy; under a success status nobody knows what it did.
        b'{"code": 50505, "message": "Model service overloaded", "status": false}',
        b'{"code": 429, "message": "rate limited", "data": null}',
        b'{"code": 20099, "message": "what?", "data": null}',
    ],
)
def test_a_success_that_names_no_batch_is_not_followed_by_another_send(
    ask: Ask, status: int, body: bytes
) -> None:
    with serving(answer(body, status)) as server, pytest.raises(TransportError) as caught:
        ask(make_settings(server.url, max_retries=3), creation())
    assert caught.value.accepted
    assert protocol.leaves_effect_open(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_that_names_something_is_not_followed_by_another_send(ask: Ask, status: int) -> None:
    body = {"id": "batch_1", "code": 50505, "message": "overloaded"}
    with serving(answer(body, status)) as server, pytest.raises(TransportError) as caught:
        ask(make_settings(server.url, max_retries=3), creation())
    assert caught.value.accepted
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [100, 102, 103, 199])
def test_an_interim_answer_is_not_the_answer(ask: Ask, status: int) -> None:
    interim = b"HTTP/1.1 %d X\r\nLink: </x>; rel=preload\r\n\r\n" % status

    def serve(connection: socket.socket, request: bytes) -> None:
        for piece in (interim, interim, answer(BATCH)):
            connection.sendall(piece)

    with serving(serve) as server:
        assert ask(make_settings(server.url), creation()).id == "batch_1"


def test_a_change_of_protocol_leaves_open_what_became_of_a_creation(ask: Ask) -> None:
    head = b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
    with serving(head) as server:
        with pytest.raises(NoAnswerError) as caught:
            ask(make_settings(server.url, max_retries=2), creation())
        assert len(server.requests) == 1
    assert protocol.leaves_effect_open(caught.value)


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://h:x/", "?\x01", "http://" + "a" * 5000, "//", "http:///"]
)
def test_a_redirect_to_a_location_that_is_none(ask: Ask, location: str) -> None:
    with (
        serving(answer(b"", 302, Location=location)) as server,
        pytest.raises(UnexpectedAnswerError) as caught,
    ):
        ask(make_settings(server.url), protocol.get_batch("batch_1"))
    assert len(str(caught.value)) < 1000


def test_an_answer_cut_after_a_success_status_may_have_created(ask: Ask) -> None:
    with serving(answer(b'{"id":', Content_Length="500")) as server, pytest.raises(TransportError) as caught:
        ask(make_settings(server.url, max_retries=3), creation())
    assert caught.value.accepted
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"code": 20012, "message": "Model does not exist.", "data": None},
        {"code": 20099, "message": "what?", "status": False},
    ],
)
def test_the_services_own_refusal_is_one_under_a_success_status_too(ask: Ask, body: Any) -> None:
    with serving(answer(body)) as server, pytest.raises(InvalidRequestError) as caught:
        ask(make_settings(server.url), creation())
    assert not protocol.leaves_effect_open(caught.value)


# Another batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [protocol.get_batch("batch_1"), protocol.cancel_batch("batch_1")])
@pytest.mark.parametrize("other", ["batch_2", "BATCH_1", 1])
def test_an_answer_about_another_batch_is_none(ask: Ask, call: Any, other: Any) -> None:
    with (
        serving(answer(BATCH | {"id": other, "status": "completed"})) as server,
        pytest.raises(UnexpectedAnswerError, match="not batch_1") as caught,
    ):
        ask(make_settings(server.url), call)
    assert protocol.is_transient(caught.value)


# The list ---------------------------------------------------------------------------------------------------


def listing(server: Server) -> list[Batch]:
    with SiliconFlowClient(make_settings(server.url)) as client:
        return list(client.list_batches())


@pytest.mark.parametrize(
    "body",
    [
        {"object": "list", "data": None, "has_more": False},
        {"code": 20000, "message": "Ok", "status": True, "data": None},
        {"code": 20000, "message": "Ok", "status": True, "data": {"data": None}},
        {"data": "none"},
        {"data": {}},
        {},
        None,
        "no",
        {"code": 50000, "message": "internal error"},
        {"code": 50000, "message": "internal error", "data": []},
        {"code": 50000, "message": "internal error", "status": False, "data": [BATCH]},
        {"error": {"message": "database is away"}},
        {"object": "list", "data": [], "error": {"message": "database is away"}},
        {"object": "list", "data": [], "error": "database is away"},
        {"message": "database is away", "data": []},
        {"status": False, "data": []},
        {"success": False, "data": []},
    ],
)
def test_a_list_that_cannot_be_read_is_not_an_empty_one(body: Any) -> None:
    with serving(answer(body)) as server, pytest.raises(SiliconFlowError):
        listing(server)


@pytest.mark.parametrize(
    "body",
    [
        {"object": "list", "data": [], "has_more": False},
        {"code": 20000, "message": "Ok", "status": True, "data": {"data": [], "object": "list"}},
        {"code": 20000, "message": "成功", "data": []},
        {"code": 0, "message": "success", "data": [], "error": {"code": 0, "message": "success"}},
        {"data": [], "error": None, "message": ""},
        [],
    ],
)
def test_an_empty_list_is_one(body: Any) -> None:
    with serving(answer(body)) as server:
        assert listing(server) == []


KEY, MARK = "airflow_identity", "0123456789abcdef"


@pytest.mark.parametrize(
    "metadata",
    [
        {KEY: MARK},
        {KEY: MARK, "number": 3, "nothing": None},
        json.dumps({KEY: MARK}),
        [[KEY, MARK]],
        [{"key": KEY, "value": MARK}],
        [{KEY: MARK}],
    ],
)
def test_metadata_is_read_in_whichever_form_it_comes(metadata: Any) -> None:
    with serving(answer({"data": [BATCH | {"metadata": metadata}], "has_more": False})) as server:
        assert listing(server)[0].metadata[KEY] == MARK


DUPLICATES = [
    ({"id": "b", "batch_id": {"a": [10**400, "\ud800\0"] * 1000}}, "batch_id"),
    ({"id": "b", "request_counts": {}, "batch_id": 10**30}, "batch_id"),
]


@pytest.mark.parametrize(("sent", "name"), DUPLICATES)
def test_the_other_name_of_a_field_is_bounded_too(sent: Any, name: str) -> None:
    kept = Batch.model_validate(sent).to_json_dict()
    assert name not in kept
    assert len(json.dumps(kept)) < 2000


def test_a_file_under_both_names_of_a_time() -> None:
    file = UploadedFile.model_validate({"id": "f", "created_at": 1, "createdAt": 10**30})
    assert file.created_at == 1
    assert "createdAt" not in file.model_dump()


@pytest.mark.parametrize("metadata", [None, "", "x", "[1, 2", "[" * 5000, [], [1, [2], {}], 7, True])
def test_an_item_without_metadata_is_listed(metadata: Any) -> None:
    entries = [BATCH | {"metadata": metadata}, {"id": "batch_2"}]
    with serving(answer({"data": entries, "has_more": False})) as server:
        assert [(batch.id, batch.metadata) for batch in listing(server)] == [("batch_1", {}), ("batch_2", {})]


def test_entries_that_cannot_be_read_are_told_once_and_in_brief(caplog: pytest.LogCaptureFixture) -> None:
    odd = [{"name": "x" * 5000}, 3, None, "batch_3"] * 200
    with (
        serving(answer({"data": [*odd, BATCH], "has_more": False})) as server,
        caplog.at_level(logging.WARNING),
        SiliconFlowClient(make_settings(server.url)) as client,
    ):
        batches = client.list_batches()
        assert [batch.id for batch in batches] == ["batch_1"]
    assert batches.unreadable == 800
    told = [record.getMessage() for record in caplog.records if "listing" in record.getMessage()]
    assert len(told) == 1
    assert "800" in told[0]
    assert len(told[0]) < 1000


@pytest.mark.parametrize("has_more", [True, None, 1])
def test_a_list_that_does_not_advance_is_cut(has_more: Any) -> None:
    page = {"data": [BATCH]} | ({} if has_more is None else {"has_more": has_more})
    with serving(answer(page)) as server, SiliconFlowClient(make_settings(server.url)) as client:
        batches = client.list_batches()
        assert len(list(batches)) == 1
        assert batches.cut
    assert len(server.requests) == 2


def test_files_of_an_account_without_any() -> None:
    answers: tuple[Any, ...] = (None, {"data": None}, [])
    for data in answers:
        with serving(answer({"code": 20000, "message": "Ok", "status": True, "data": data})) as server:
            assert ask_sync(make_settings(server.url), protocol.list_files()).items == ()


# Rows -------------------------------------------------------------------------------------------------------

ANSWER = {"body": {"choices": [{"message": {"content": "42"}}]}}


@pytest.mark.parametrize("code", [0, 200, 20000, "20000", "success", "OK", None, ""])
@pytest.mark.parametrize("message", ["success", "ok", "Ok.", "SUCCESS", "Succeeded"])
def test_an_error_that_says_success_is_none(code: Any, message: str) -> None:
    error = {"code": code, "message": message, "type": None}
    assert BatchResult(custom_id="r", response=ANSWER, error=error).outcome is Outcome.OK
    assert BatchResult(custom_id="r", response=None, error=error).outcome is Outcome.ERROR


@pytest.mark.parametrize("code", [0, 200, 20000, "success"])
@pytest.mark.parametrize("message", ["", None])
def test_a_code_of_success_needs_no_words(code: Any, message: Any) -> None:
    error = {"code": code, "message": message}
    assert BatchResult(custom_id="r", response=ANSWER, error=error).outcome is Outcome.OK


@pytest.mark.parametrize(
    "error",
    [
        {"code": 20015, "message": "success"},
        {"code": 20000, "message": "rate limited"},
        {"code": 0, "message": "no success"},
        {"code": False, "message": "ok"},
        {"code": {"a": 1}, "message": "ok"},
        {"code": None, "message": ["ok"]},
        {"message": "failed"},
        {"detail": "failed"},
        "failed",
        ["failed"],
    ],
)
def test_an_error_that_says_anything_else_is_one(error: Any) -> None:
    assert BatchResult(custom_id="r", response=ANSWER, error=error).outcome is Outcome.ERROR


@pytest.mark.parametrize("body", [{"code": 20012, "message": "no"}, {"error": {"message": "no"}}])
def test_an_error_of_the_service_is_told(ask: Ask, body: Any) -> None:
    with serving(answer(body, 400)) as server, pytest.raises(APIError, match="no"):
        ask(make_settings(server.url), creation())

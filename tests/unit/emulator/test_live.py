"""Rows that are asked one by one: answers, refusals, limits, faults, and what is billed for them."""

from __future__ import annotations

import json
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.emulator import LiveFigures, ServiceError, running_emulator
from tests.unit.emulator.clients import MODEL, Account, Client, row

if TYPE_CHECKING:
    from collections.abc import Callable

CHAT = "/chat/completions"
OTHER = "deepseek-ai/DeepSeek-R1"
PRICES: dict[str, Any] = {
    MODEL: {"prompt": 1, "completion": 4, "live": {"prompt": 2, "completion": 8, "cached_prompt": "0.2"}},
    OTHER: {"prompt": 2, "completion": 8},
}


def body(text: str = "What is a batch?", **parameters: Any) -> dict[str, Any]:
    whole: dict[str, Any] = row("", text, **parameters)["body"]
    return whole


class Desk(Account):
    """An account whose rows are asked live."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        call = self.service.live.ask(request)
        self.service.live.answer(call)
        answer: dict[str, Any] = json.loads(call.content)
        return answer

    def status(self, request: dict[str, Any]) -> int:
        try:
            self.answer(request)
        except ServiceError as error:
            return error.status
        return 200

    @property
    def figures(self) -> LiveFigures:
        return self.service.live.figures()


def content_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answer_is_what_a_batch_line_has_and_the_same_each_time(tmp_path: Path) -> None:
    known = tmp_path / "answers.jsonl"
    known.write_text('{"prompt": "What is a batch?", "answer": "Many rows."}\n')
    account = Desk(tmp_path / "data", answers=known, cached_share=0.5, thinking_tokens=50)
    request = body(enable_thinking=True, max_tokens=2)
    live = account.answer(request)
    batch = account.run([{"custom_id": "a", "body": request}])
    line = account.lines(batch, "output")[0]["response"]["body"]
    for part in ("choices", "usage", "model", "object"):
        assert live[part] == line[part]
    assert content_of(live) == "Many row"
    assert live["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert account.answer(request) == live
    assert (account.figures.asked, account.figures.asked_again) == (1, 1)


@pytest.mark.parametrize(
    ("request_body", "status", "code"),
    [
        ([], 400, 20015),
        ({"model": MODEL, "messages": []}, 400, 20015),
        ({"messages": body()["messages"]}, 400, 20015),
        (body(model="nobody/nothing"), 400, 20012),
        (body(response_format={"type": "json_object"}), 400, 20024),
        (body(thinking_budget=1), 400, 20015),
        (body(response_format="json"), 400, 20015),
        (body("[[emulator:unheard-of]]"), 400, 20015),
        (body("[[emulator:error=503]]"), 503, 50505),
        (body("[[emulator:error=413]]"), 413, 20015),
    ],
)
def test_refusal_is_the_service_s_own_and_costs_nothing(
    tmp_path: Path, request_body: Any, status: int, code: int
) -> None:
    account = Desk(tmp_path, prices=PRICES, no_json_models=[MODEL])
    for _ in range(2):
        with pytest.raises(ServiceError) as refused:
            account.answer(request_body)
        assert (refused.value.status, refused.value.body["code"]) == (status, code)
    assert (account.figures.failed, account.figures.answered) == (2, 0)
    assert account.service.bill().total == 0


def test_an_empty_account_is_refused(tmp_path: Path) -> None:
    account = Desk(tmp_path, balance=0.0)
    with pytest.raises(ServiceError) as refused:
        account.answer(body())
    assert (refused.value.status, refused.value.body["code"]) == (402, 30001)


def test_markers_of_batches_only_do_not_apply(tmp_path: Path) -> None:
    account = Desk(tmp_path)
    for marker in ("expire", "missing", "missing-once", "once=expire", "duplicate"):
        assert account.status(body(f"[[emulator:{marker}]]")) == 200
    assert account.answer(body("[[emulator:wrong-model]]"))["model"] == "emulator/another-model"


def test_the_first_time_goes_by_the_row_however_it_is_asked_again(tmp_path: Path) -> None:
    account = Desk(tmp_path, invalid_rate=1.0, wrong_attempts=2)
    request = body("Answer as JSON.", response_format={"type": "json_object"})
    answers = []
    for attempt in range(3):
        answers.append(content_of(account.answer({**request, "max_tokens": 1000 + attempt})))
        reply = [
            {"role": "assistant", "content": answers[-1]},
            {"role": "user", "content": "This was wrong. Answer again."},
        ]
        request["messages"] = [*request["messages"], *reply]

    def right(text: str) -> bool:
        try:
            return isinstance(json.loads(text)["answer"], str)
        except (ValueError, KeyError, TypeError):
            return False

    assert [right(text) for text in answers] == [False, False, True]
    account.service.configure({"invalid_rate": 0.0, "live_error_rate": 1.0})
    assert [account.status(body("new")) in (429, 503), account.status(body("new"))] == [True, 200]
    account.service.configure({"live_error_rate": 0.0})
    marked = body("[[emulator:once=503]] [[emulator:empty-once]]")
    assert account.status(marked) == 503
    assert [content_of(account.answer(marked)) == "" for _ in range(2)] == [True, False]
    # An example in the prompt is no earlier attempt.
    example = [*body("[[emulator:empty-once]]")["messages"], {"role": "assistant", "content": "x"}]
    texts = [
        content_of(account.answer({**body(), "messages": [*example, *body(question)["messages"]]}))
        for question in "ab"
    ]
    assert texts == ["", ""]


def test_rate_limits_are_of_one_model_and_state_when_to_come_back(tmp_path: Path) -> None:
    account = Desk(tmp_path, live_rpm=60, live_burst=2.0, live_retry_after=1.5)
    assert [account.status(body()) for _ in range(4)] == [200, 200, 429, 429]
    assert account.status(body(model=OTHER)) == 200
    account.clock.time += 1
    assert [account.status(body()) for _ in range(2)] == [200, 429]
    with pytest.raises(ServiceError) as refused:
        account.answer(body())
    message = "Request was rejected due to rate limiting. Details: RPM limit reached."
    assert (refused.value.body, refused.value.headers) == (
        {"message": message, "data": None},
        {"Retry-After": "1.5"},
    )
    usage = account.answer(body(model=OTHER))["usage"]
    account.service.configure(
        {"live_rpm": 0, "live_tpm": usage["total_tokens"] * 60, "live_burst": 1, "live_retry_after": 0}
    )
    assert account.status(body(model=OTHER)) == 200
    with pytest.raises(ServiceError) as refused:
        account.answer(body(model=OTHER))
    assert "TPM limit" in refused.value.body["message"]
    assert refused.value.headers == {}
    lines = {line.model: (line.rows, line.refused) for line in account.service.bill().lines}
    assert lines == {MODEL: (3, 4), OTHER: (3, 1)}


def test_latency_is_in_real_seconds_and_varies_by_body(tmp_path: Path) -> None:
    account = Desk(tmp_path, speed=1000.0, live_latency=2.0)
    bodies = [body(str(number)) for number in range(50)]
    assert {account.service.live.ask(one).seconds for one in bodies} == {2.0}
    account.service.configure({"live_jitter": 0.25})
    drawn = [account.service.live.ask(one).seconds for one in bodies]
    assert drawn == [account.service.live.ask(one).seconds for one in bodies]
    assert 1.5 <= min(drawn) < 1.7 < 2.3 < max(drawn) <= 2.5


@settings(max_examples=40)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from([MODEL, OTHER]),
            st.integers(0, 6),
            st.sampled_from(["answer", "lose", "leave"]),
            st.floats(0, 1),
        ),
        max_size=60,
    )
)
def test_bill_is_the_sum_of_the_usage_of_the_answers(asked: list[tuple[str, int, str, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        account = Desk(Path(folder), prices=PRICES, cached_share=0.4, live_rpm=240, live_error_rate=0.3)
        account.run([row("a"), row("b", model=OTHER)])
        before = account.service.bill()
        expected = {MODEL: Decimal(0), OTHER: Decimal(0)}
        answered, lost, refused, failed = [], 0, 0, 0
        for model, number, end, seconds in asked:
            account.clock.time += seconds
            request = body("word " * number, model=model)
            try:
                call = account.service.live.ask(request)
            except ServiceError as error:
                refused += error.status == 429
                failed += error.status != 429
                continue
            if end == "leave":
                continue
            account.service.live.answer(call)
            answered.append(json.dumps(request))
            if end == "lose":
                account.service.live.lose(call)
                lost += 1
            usage = json.loads(call.content)["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"] if usage["prompt_tokens"] > 2 else 0
            millionths = (usage["prompt_tokens"] - cached) * 2 + cached * Decimal("0.2")
            expected[model] += (millionths + usage["completion_tokens"] * 8) / 1_000_000
        bill, figures = account.service.bill(), account.figures
        assert bill.cost(MODEL, "live") == expected[MODEL]
        # No live price: counted, and nothing known about what it costs.
        assert bill.cost(OTHER, "live") == 0
        assert bill.cost(route="batch") == before.total
        assert bill.total == before.total + expected[MODEL]
        assert bill.rows(route="live") == figures.answered == len(answered)
        assert (figures.lost, figures.refused, figures.failed) == (lost, refused, failed)
        assert figures.asked == len(set(answered))
        assert figures.asked_again == len(answered) - len(set(answered))


class Caller(Client):
    def ask(self, text: str = "Hi", **parameters: Any) -> requests.Response:
        return self.call("POST", CHAT, json=body(text, **parameters))


def test_over_http(tmp_path: Path) -> None:
    with running_emulator(live_latency=0.0, live_retry_after=7, prices=PRICES) as emulator:
        caller = Caller(emulator)
        answer = caller.ask("x" * 3_000_000)
        assert (answer.status_code, answer.json()["object"]) == (200, "chat.completion")
        assert answer.headers["x-siliconcloud-trace-id"]
        stream = caller.ask(stream=True)
        assert stream.headers["Content-Type"] == "text/event-stream"
        chunk, done, rest = stream.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"]["content"]
        refused = caller.ask("[[emulator:error=429]]")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "7")
        assert caller.call("POST", CHAT, data=b"{").json()["code"] == 20015
        caller.headers = {}
        assert caller.ask().status_code == 401
        assert caller.control("GET", "live") == emulator.live.as_dict()
        assert (emulator.live.answered, emulator.live.refused, emulator.live.failed) == (2, 1, 0)
        assert emulator.request_counts == {f"POST {CHAT}": 5}
        (line,) = caller.control("GET", "bill")["lines"]
        assert (line["route"], line["rows"], line["refused"]) == ("live", 2, 1)


def test_faults_before_the_work_cost_nothing_and_faults_after_it_lose_a_paid_answer() -> None:
    with running_emulator(live_latency=0.0, prices=PRICES) as emulator:
        caller = Caller(emulator)
        emulator.faults.add(f"POST {CHAT}:status=503,times=3")
        overloaded = [caller.ask() for _ in range(3)]
        assert [(one.status_code, one.json()["code"]) for one in overloaded] == [(503, 50505)] * 3
        assert emulator.live.answered == 0
        emulator.faults.add(f"POST {CHAT}:reset-after")
        with pytest.raises(requests.ConnectionError):
            caller.ask()
        emulator.faults.add(f"POST {CHAT}:status-after=502")
        assert caller.ask().status_code == 502
        assert caller.ask().status_code == 200
        figures = emulator.live
        assert (figures.answered, figures.lost, figures.asked, figures.asked_again) == (3, 2, 1, 2)
        assert emulator.bill.cost(MODEL, "live") == emulator.bill.total > 0


def test_a_client_that_leaves_is_billed_once_the_answer_is_done() -> None:
    with running_emulator(live_latency=0.7, prices=PRICES) as emulator:
        with pytest.raises(requests.Timeout):
            requests.post(
                emulator.base_url + CHAT, json=body(), headers=Caller(emulator).headers, timeout=0.3
            )
        assert (emulator.live.open, emulator.bill.rows()) == (1, 0)
        until(lambda: emulator.live.open == 0)
        until(lambda: emulator.live.lost == 1)
        assert (emulator.live.answered, emulator.bill.rows(MODEL, "live")) == (1, 1)
        assert [one.status for one in emulator.requests] == [0]


def test_an_emulator_that_is_stopped_does_not_wait_for_answers() -> None:
    started = time.monotonic()
    with running_emulator(live_latency=60.0) as emulator:
        with pytest.raises(requests.Timeout):
            requests.post(
                emulator.base_url + CHAT, json=body(), headers=Caller(emulator).headers, timeout=0.2
            )
        until(lambda: emulator.live.open == 1)
    assert time.monotonic() - started < 20

"""``max_cost``: nothing is sent that could go over it, whatever happens; and what is not sent is said."""

from __future__ import annotations

import json
import logging
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from airflow_provider_siliconflow.api.exceptions import (
    BatchPartialFailureError,
    InvalidInputError,
    InvalidRequestFileError,
    SiliconFlowError,
)
from airflow_provider_siliconflow.batch_files.cost_bounds import Tariff, bound_row
from airflow_provider_siliconflow.batch_files.merge import BatchFiles
from airflow_provider_siliconflow.emulator.server import Emulator
from airflow_provider_siliconflow.jobs.outcome import judge_run
from tests.unit.jobs.faulty import FAULTS, Crash
from tests.unit.jobs.test_cache import CachingJob, sent
from tests.unit.jobs.test_whole_life import EVENTS, SECONDS, TYPED, WRONG, Life, quickly
from tests.unit.jobs.whole_job import Job, posts

V3, R1, QWEN = "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "Qwen/Qwen3-8B"
PRICES: dict[str, Any] = {
    V3: {"prompt": 1, "completion": 4, "thinking": 0, "cached_prompt": 0.1},
    QWEN: {"prompt": 0.7, "completion": 2.9},
}


def rows(count: int, **body: Any) -> list[Any]:
    parameters = {"max_tokens": 100, "enable_thinking": False, **body}
    return [
        {"custom_id": f"q{n}", "messages": [{"role": "user", "content": f"Say {n}"}], **parameters}
        for n in range(count)
    ]


def job(emulator: Emulator, folder: Path, requests: Any, **changes: Any) -> Job:
    return Job(emulator, folder, requests, **{"models": [V3, QWEN], "prices": PRICES, **changes})


def least(
    requests: list[Any], models: tuple[str, ...] = (V3, QWEN), prices: dict[str, Any] = PRICES
) -> float:
    """Return what the rows of a job can cost at most, in CNY."""
    tariff = Tariff(models, prices, Fraction(1))
    total = Fraction()
    for row in requests:
        body = {name: value for name, value in row.items() if name != "custom_id"}
        line = json.dumps({"custom_id": "a", "body": body}, ensure_ascii=False, separators=(",", ":"))
        own, bound = bound_row(line.encode())
        for model in models or (None,):
            total += tariff.cost({own: bound}, model)
    return float(total)


# The property ---------------------------------------------------------------------------------------------------

prices = st.integers(0, 20_000_000).map(lambda n: n / 1_000_000)
#: What becomes of rows; "" is an answer.
FATES = (
    "",
    "",
    "",
    "",
    "once=503",
    "once=missing",
    "missing",
    "expire",
    "error=400",
    "length",
    "duplicate",
    "once=402",
)
markers = st.sampled_from([fate and f"[[emulator:{fate}]]" for fate in FATES])
thinking: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"enable_thinking": False},
        {"enable_thinking": False, "n": 2},
        {"thinking_budget": 200},
        {"thinking_budget": 900},
    ]
)


@st.composite
def requests(draw: st.DrawFn) -> list[Any]:
    return [
        {
            "custom_id": f"q{n}",
            "messages": [
                {"role": "user", "content": draw(st.sampled_from(["Say", "今天天气"])) * length + mark}
            ],
            "max_tokens": draw(st.integers(1, 300)),
            "model": draw(st.sampled_from([V3, V3, QWEN, QWEN, R1])),
            **draw(thinking),
        }
        for n, (length, mark) in enumerate(
            draw(st.lists(st.tuples(st.integers(1, 200), markers), min_size=1, max_size=12))
        )
    ]


@settings(quickly, max_examples=50, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    script=st.lists(st.sampled_from(("none", *FAULTS)), max_size=30),
    events=st.lists(st.sampled_from(EVENTS), max_size=8),
    service=st.fixed_dictionaries(
        {
            "list_lag_seconds": st.sampled_from([0.0, 40.0]),
            "settle_seconds": SECONDS | st.just(1e9),
            "late_output_seconds": SECONDS,
            "partial_output_seconds": SECONDS,
            "max_open_batches": st.sampled_from([0, 2]),
            "cached_share": st.sampled_from([0.0, 0.5]),
            "thinking_tokens": st.sampled_from([0, 500]),
            "row_error_rate": st.sampled_from([0.0, 0.3]),
        }
    ),
    given_rows=requests(),
    of_prices=st.fixed_dictionaries(
        {
            model: st.fixed_dictionaries(
                {"prompt": prices, "completion": prices}, optional={"cached_prompt": prices}
            )
            for model in (V3, R1, QWEN)
        }
    ),
    options=st.fixed_dictionaries(
        {
            "models": st.sampled_from(
                [None, [V3], [V3, R1], [QWEN, V3], {V3: {"max_tokens": 40}, QWEN: {"n": 2, "seed": 1}}]
            ),
            "max_row_attempts": st.integers(1, 3),
            "max_rows_per_batch": st.integers(1, 5),
            "max_in_flight": st.sampled_from([None, 2]),
        }
    ),
    # A row that is sent again may cost more: it gets these parameters, and shows the answer that was wrong.
    acceptance=st.sampled_from(
        [{}, {"retry_params": {"max_tokens": 400}}, {**TYPED, "retry_params": {"max_tokens": 300, "n": 2}}]
    ),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
    stated=st.sampled_from([{}, {"thinking": 900}]),
    costs_its_bound=st.booleans(),
    retry_delay=st.sampled_from([0.0, 300.0]),
)
def test_the_bill_never_exceeds_max_cost(
    tmp_path_factory: pytest.TempPathFactory,
    script: list[str],
    events: list[str],
    service: dict[str, Any],
    given_rows: list[Any],
    of_prices: dict[str, Any],
    options: dict[str, Any],
    acceptance: dict[str, Any],
    share: float,
    stated: dict[str, int],
    costs_its_bound: bool,
    retry_delay: float,
) -> None:
    if costs_its_bound:
        # Prompts are free, and every answer is cut, so that whatever is sent too much is on the bill.
        of_prices = {
            model: {"prompt": 0, "completion": price["completion"]} for model, price in of_prices.items()
        }
        answer = {"max_tokens": 4, "enable_thinking": False, "n": 1, "thinking_budget": None}
        given_rows = [{**row, **answer, "model": V3} for row in given_rows]
        options = {**options, "models": options["models"] and [V3, QWEN]}
    if acceptance:
        options = {**options, **acceptance}
        service = {**service, **WRONG}
    folder = tmp_path_factory.mktemp("life")
    life = Life(folder, script, events, rows_per_second=0.1, prices=of_prices, **service)
    life.requests = given_rows
    given_prices = {model: price | stated for model, price in of_prices.items()}
    most = share * least(given_rows, tuple(options["models"] or ()), given_prices)
    max_cost = math.ceil(most * 1_000_000) / 1_000_000
    life.arguments = {**options, "max_cost": max_cost, "prices": given_prices}
    manifest = None
    # Whether the job comes to an end is the question of another test.
    for _ in range(15):
        try:
            manifest = life.attempt()
            break
        except (Crash, SiliconFlowError) as exc:
            if isinstance(exc, SiliconFlowError) and not exc.retryable:
                break
            life.clock.sleep(retry_delay)
    life.clock.sleep(1e7)
    bill = life.service.bill().total
    assert bill <= Decimal(str(max_cost))
    if manifest is None:
        event("nothing sent" if not bill else "no end")
        return
    budget = manifest["budget"]
    event("rows not sent" if budget["rows_not_sent"] else "all sent")
    assert budget["spent"] + budget["held"] <= budget["max_cost"] + 1e-6
    assert float(bill) <= budget["spent"] + budget["held"] + 1e-6
    if not budget["held"]:
        assert budget["spent"] == pytest.approx(float(bill), abs=1e-6)
    if not manifest["models"][0]["model"] or budget["held"]:
        return
    assert manifest["cost"]["total"] == pytest.approx(budget["spent"], abs=2e-6)


# By hand --------------------------------------------------------------------------------------------------------

by_hand = pytest.mark.emulator(
    speed=2000.0,
    prices={
        model: {name: value for name, value in price.items() if name != "thinking"}
        for model, price in PRICES.items()
    },
)


@by_hand
def test_a_job_that_surely_fits_is_sent_at_once(emulator: Emulator, tmp_path: Path) -> None:
    most = least(rows(9))
    enough = job(emulator, tmp_path, rows(9), max_cost=most)
    manifest = enough.attempt()
    assert manifest["rows"]["ok"] == 18
    assert len(enough.waits) == 1
    budget = manifest["budget"]
    assert budget == {
        "currency": "CNY",
        "max_cost": pytest.approx(most, abs=1e-6),
        "spent": pytest.approx(float(emulator.bill.total), abs=1e-6),
        "held": 0,
        "rows_not_sent": 0,
        "cost_not_sent": 0,
    }
    assert judge_run(manifest, enough.options) is None


@by_hand
def test_a_row_that_may_cost_any_sum_when_it_is_sent_again_is_refused(
    emulator: Emulator, tmp_path: Path
) -> None:
    again = {"max_row_attempts": 2, "retry_params": {"enable_thinking": True}}
    with pytest.raises(InvalidInputError, match=r"with retry_params, .* may think"):
        job(emulator, tmp_path, rows(9), max_cost=1, **again).attempt()
    assert posts(emulator) == (0, 0)


@by_hand
def test_cached_rows_cost_nothing_of_max_cost(emulator: Emulator, tmp_path: Path) -> None:
    def cost(night: int, count: int, most: float) -> dict[str, Any]:
        options = {"models": [V3, QWEN], "prices": PRICES, "max_cost": most}
        manifest = CachingJob(
            emulator, tmp_path / str(night), tmp_path / "cache", rows(count), **options
        ).attempt()
        assert manifest["rows"]["ok"] == 2 * count
        return dict(manifest["budget"])

    cost(0, 40, 1)
    assert cost(1, 40, 0)["spent"] == 0
    assert cost(2, 42, least(rows(42)[40:]))["spent"] > 0
    assert sent(emulator) == 84


@by_hand
def test_batches_go_out_as_real_costs_become_known(emulator: Emulator, tmp_path: Path) -> None:
    most = least(rows(40)) / 2
    half = job(emulator, tmp_path, rows(40), max_cost=most)
    manifest = half.attempt()
    assert manifest["rows"]["ok"] == 80
    assert len(half.waits) > 1
    assert manifest["budget"]["spent"] == pytest.approx(float(emulator.bill.total), abs=1e-6)


@by_hand
def test_what_was_not_sent_is_missing_and_said_in_rows_and_money(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # Every answer is as long as it may be, so nothing that is held comes free.
    of_prices = {model: {**price, "prompt": 0, "cached_prompt": 0} for model, price in PRICES.items()}
    emulator.service.configure(
        {"prices": {m: {"prompt": 0, "completion": p["completion"]} for m, p in of_prices.items()}}
    )
    given = rows(30, max_tokens=5)
    most = least(given, prices=of_prices) / 2
    little = job(emulator, tmp_path, given, max_cost=most, max_row_attempts=3, prices=of_prices)
    manifest = little.attempt()
    counts, budget = manifest["rows"], manifest["budget"]
    assert float(emulator.bill.total) <= most
    assert (counts["total"], counts["error"], counts["expired"]) == (60, 0, 0)
    assert counts["missing"] == budget["rows_not_sent"] > 0
    assert counts["ok"] > 0
    assert budget["cost_not_sent"] == pytest.approx(2 * most - budget["spent"], abs=2e-6)
    # What is left is less than the smallest of the batches that were not sent.
    assert budget["max_cost"] - budget["spent"] < most / 8 + 1e-6
    assert manifest["worth_another_attempt"] == 0
    for model in (V3, QWEN):
        folder = tmp_path / model.replace("/", "--")
        found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        assert [row["custom_id"] for row in found] == [row["custom_id"] for row in given]
        unsent = [row["error"] for row in found if row["error"]]
        assert {each["code"] for each in unsent} <= {"missing"}
        assert all(
            "not sent, since its batch could cost more than is left of max_cost" in each["message"]
            for each in unsent
        )
    warning = judge_run(manifest, little.options)
    assert f"{budget['rows_not_sent']} rows, which could cost up to" in (warning or "")
    with pytest.raises(BatchPartialFailureError, match="were not sent: of max_cost"):
        judge_run(manifest, job(emulator, tmp_path, [], max_error_rate=0.1).options)
    assert "are spent and up to" in caplog.text


@by_hand
@pytest.mark.parametrize(
    ("max_cost", "of_prices", "said"),
    [
        (
            0,
            PRICES,
            r"max_cost is 0 CNY, but the prompts of the rows alone cost about 0\.000002 CNY. Nothing was uploaded",
        ),
        (
            0,
            {V3: {"prompt": 0, "completion": 4, "thinking": 0}},
            r"max_cost is 0 CNY, but even the cheapest batch can cost 0\.\d+ CNY",
        ),
        (
            "0.0002",
            {V3: {"prompt": 0, "completion": 4, "thinking": 0}},
            r"max_cost is 0\.0002 CNY, but even the cheapest batch can cost 0\.0004 CNY",
        ),
        (1, {QWEN: PRICES[QWEN]}, rf"prices has none for '{V3}'"),
    ],
)
def test_what_surely_cannot_be_paid_is_refused_before_anything_is_uploaded(
    emulator: Emulator, tmp_path: Path, max_cost: Any, of_prices: Any, said: str
) -> None:
    with pytest.raises(InvalidInputError, match=said):
        job(emulator, tmp_path, rows(9), models=[V3], max_cost=float(max_cost), prices=of_prices).attempt()
    assert posts(emulator) == (0, 0)
    assert not list(tmp_path.iterdir())


@by_hand
def test_a_row_without_max_tokens_is_named_before_anything_is_uploaded(
    emulator: Emulator, tmp_path: Path
) -> None:
    given = rows(9)
    del given[4]["max_tokens"]
    with pytest.raises(InvalidRequestFileError, match=r"line 5 \(custom_id 'q4'\): max_tokens is missing"):
        job(emulator, tmp_path, given, max_cost=1).attempt()
    assert posts(emulator) == (0, 0)


@pytest.mark.emulator(speed=2000.0, balance=0.001)
def test_a_balance_below_the_prompts_refuses_a_job_with_max_cost_and_warns_without(
    emulator: Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dear = {model: {"prompt": 900, "completion": 1} for model in (V3, QWEN)}
    said = r"charged balance is 0 CNY, less than the estimated cost of the prompts alone, 0\.0\d+ CNY"
    with pytest.raises(
        InvalidInputError, match=f"max_cost is set, and the account's {said}. Nothing was uploaded"
    ):
        job(emulator, tmp_path, rows(9), max_cost=100, prices=dear).attempt()
    assert posts(emulator) == (0, 0)
    job(emulator, tmp_path / "warned", rows(9), prices=dear).attempt()
    assert "less than the estimated cost of the prompts alone" in caplog.text
    emulator.faults.add("GET /user/info:status=500")
    job(emulator, tmp_path / "unknown", rows(9), max_cost=100, prices=dear).attempt()


@by_hand
def test_a_batch_whose_answers_do_not_state_their_tokens_holds_the_most_that_it_can_cost(
    emulator: Emulator, tmp_path: Path
) -> None:
    one = job(emulator, tmp_path, rows(3), models=[V3], max_cost=5)
    run = one.next_try()
    wait = run.start(lambda: one.requests, "requests", timeout=None)
    assert wait is not None
    assert run.resume(one.wait(wait)) is None
    opened = run._opened
    assert opened is not None
    budget = opened.collector.budget
    assert budget is not None
    (piece,) = opened.job.pieces
    assert budget.spent().known == Fraction(emulator.bill.total)
    output = tmp_path / "output.jsonl"
    body = {"choices": [{"message": {"content": "x"}}]}
    output.write_text(json.dumps({"custom_id": "q0", "response": {"body": body}}))
    budget.learn(piece, wait.batch_ids[0], BatchFiles(output, None))
    assert (float(budget.spent().known), budget.spent().held) == (0.0, budget.bound(piece))


@by_hand
def test_a_later_process_needs_nothing_but_the_ledger_and_the_results(
    emulator: Emulator, tmp_path: Path
) -> None:
    """What is written down only saves reading again: damage to it changes no decision."""
    most = least(rows(40)) / 2
    half = job(emulator, tmp_path, rows(40), max_cost=most)
    run = half.next_try()
    wait = run.start(lambda: half.requests, "requests", timeout=None)
    while wait is not None:
        (record,) = tmp_path.glob(".siliconflow/*/spend.json")
        record.write_text('{"used": {"a": 7}}' if len(half.waits) % 2 else "[")
        half.waits.append(wait)
        ended = half.wait(wait)
        run = half.process()
        wait = run.resume(ended)
    assert len(half.waits) > 2
    assert run.finish()["budget"]["spent"] == pytest.approx(float(emulator.bill.total), abs=1e-6)
    assert float(emulator.bill.total) <= most

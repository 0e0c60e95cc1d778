"""The bill, held against what a client reads in the result files."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_siliconflow.emulator import Bill, running_emulator
from tests.unit.emulator.clients import MODEL, Account, Client, row, rows

if TYPE_CHECKING:
    from pathlib import Path

OTHER = "deepseek-ai/DeepSeek-R1"
PRICES: dict[str, Any] = {
    MODEL: {"prompt": "0.7", "completion": 2.1, "cached_prompt": Decimal("0.07")},
    OTHER: {"prompt": 2, "completion": 8},
}


def read_usage(account: Account, *batches: dict[str, Any]) -> dict[str, Counter[str]]:
    """Return the usage by model that the output files of batches state, each row once."""
    found: dict[str, Counter[str]] = {}
    for batch in batches:
        for body in {
            line["custom_id"]: line["response"]["body"] for line in account.lines(batch, "output")
        }.values():
            usage = body["usage"]
            cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            found.setdefault(body["model"], Counter()).update(
                rows=1, prompt=usage["prompt_tokens"], completion=usage["completion_tokens"], cached=cached
            )
    return found


def billed_usage(bill: Bill) -> dict[str, Counter[str]]:
    return {
        line.model: Counter(
            rows=line.rows,
            prompt=line.prompt_tokens,
            completion=line.completion_tokens,
            cached=line.cached_tokens,
        )
        for line in bill.lines
    }


def test_bill_is_the_sum_of_the_usage_by_model(tmp_path: Path) -> None:
    account = Account(tmp_path, prices=PRICES, cached_share=0.3, invalid_rate=0.2, row_error_rate=0.2)
    lines = [row(f"r{number}", "word " * (number % 40)) for number in range(300)]
    lines += [row("twice", "[[emulator:duplicate]]"), row("cut", "[[emulator:length]]")]
    lines += [row("lost", "[[emulator:missing]]"), row("late", "[[emulator:expire]]")]
    batches = [account.run(lines), account.run(lines), account.run(lines, replace={"model": OTHER})]
    bill, read = account.service.bill(), read_usage(account, *batches)
    assert {line.route for line in bill.lines} == {"batch"}
    assert billed_usage(bill) == read
    mine, other = read[MODEL], read[OTHER]
    # A third of every prompt, rounded down row by row.
    assert 0.25 < mine["cached"] / mine["prompt"] < 0.3
    expected = (mine["prompt"] - mine["cached"]) * Decimal("0.7") + mine["cached"] * Decimal("0.07")
    expected = (expected + mine["completion"] * Decimal("2.1")) / 1_000_000
    assert bill.cost(MODEL) == expected
    # Without a price of their own, cached tokens cost what the others do.
    assert bill.cost(OTHER) == Decimal(other["prompt"] * 2 + other["completion"] * 8) / 1_000_000
    assert bill.total == bill.cost(route="batch") == bill.cost(MODEL) + bill.cost(OTHER)
    assert bill.cost(route="live") == 0


def test_rows_are_billed_as_they_are_done(tmp_path: Path) -> None:
    account = Account(tmp_path, prices=PRICES, rows_per_second=1)
    batch = account.create(account.upload(rows(100)))
    seen = []
    for seconds in (29, 11, 40):
        account.clock.time += seconds
        seen.append(sum(line.rows for line in account.service.bill().lines))
    assert seen == [0, 10, 50]
    account.service.cancel_batch(batch["id"])
    account.clock.time += 1000
    batch = account.service.get_batch(batch["id"])
    assert batch["status"] == "cancelled"
    assert billed_usage(account.service.bill()) == read_usage(account, batch)
    # What a test makes of the batch afterwards counts, too.
    account.service.force_status(batch["id"], "failed")
    assert account.service.bill() == Bill()


def test_rows_of_an_expired_batch_that_were_done_are_billed(tmp_path: Path) -> None:
    account = Account(tmp_path, prices=PRICES, rows_per_second=0.0005)
    batch = account.create(account.upload(rows(100)))
    account.clock.time += 86401
    batch = account.service.get_batch(batch["id"])
    assert batch["status"] == "expired"
    assert 0 < batch["request_counts"]["completed"] < 100
    assert billed_usage(account.service.bill()) == read_usage(account, batch)


def test_a_model_without_a_price_is_counted_and_costs_nothing_known(tmp_path: Path) -> None:
    account = Account(tmp_path, prices={OTHER: PRICES[OTHER]})
    account.run([row("a"), row("b", model=OTHER)])
    bill = account.service.bill()
    assert {line.model: line.cost is None for line in bill.lines} == {MODEL: True, OTHER: False}
    assert bill.total == bill.cost(OTHER) > 0
    # The prices in force are those of the day the bill is asked for.
    account.service.configure({"prices": {MODEL: {"prompt": "1", "completion": 0}}})
    assert account.service.bill().cost(OTHER) == 0
    assert account.service.bill().cost(MODEL) > 0


def test_bill_and_results_keep_the_cached_share_of_their_batch(tmp_path: Path) -> None:
    account = Account(tmp_path, persistent=True, prices=PRICES, cached_share=1.0)
    batch = account.create(account.upload(rows(3)))
    account.service.advance(1000)
    before = account.service.bill()
    assert before.lines[0].cached_tokens == before.lines[0].prompt_tokens
    restarted = Account(tmp_path, persistent=True, prices=PRICES)
    assert restarted.service.bill() == before
    assert billed_usage(before) == read_usage(restarted, batch)
    other = restarted.run(rows(3), replace={"model": OTHER})
    assert "prompt_tokens_details" not in restarted.lines(other, "output")[0]["response"]["body"]["usage"]


def test_bill_over_http_is_the_same_and_exact() -> None:
    with running_emulator(prices={MODEL: {"prompt": "0.1", "completion": "0.3"}}) as emulator:
        client = Client(emulator)
        assert client.control("GET", "bill") == {"total": "0", "currency": "CNY", "lines": []}
        client.finished()
        shown = client.control("GET", "bill")
        assert Decimal(shown["total"]) == emulator.bill.total > 0
        (line,) = shown["lines"]
        assert (line["model"], line["route"], line["rows"]) == (MODEL, "batch", 3)
        assert (line["cost"], "E" in line["cost"]) == (shown["total"], False)
        changed = client.control("POST", "config", {"prices": {MODEL: {"prompt": 0, "completion": "0"}}})
        assert changed["prices"][MODEL]["prompt"] == "0"
        assert emulator.bill.total == 0


@pytest.mark.parametrize(
    ("prices", "reason"),
    [
        ([], "must be a mapping such as"),
        ({MODEL: 5}, MODEL),
        ({MODEL: {"prompt": 1}}, "missing required field `completion`"),
        ({MODEL: {"prompt": 1, "completion": 1, "promt": 1}}, "unknown field `promt`"),
        ({MODEL: {"prompt": -1, "completion": 1}}, "prompt must be 0 or more, not -1"),
        ({MODEL: {"prompt": 1, "completion": "NaN"}}, "completion must be 0 or more, not NaN"),
        ({MODEL: {"prompt": 1, "completion": 1, "live": {"prompt": 1}}}, "completion"),
        (
            {MODEL: {"prompt": 1, "completion": 1, "live": {"prompt": 1, "completion": -2}}},
            "completion must be 0 or more, not -2",
        ),
    ],
)
def test_wrong_price_is_named(tmp_path: Path, prices: Any, reason: str) -> None:
    with pytest.raises(ValueError, match="prices") as refused:
        Account(tmp_path, prices=prices)
    assert reason in str(refused.value)

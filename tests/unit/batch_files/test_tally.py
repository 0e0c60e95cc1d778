"""Figures add up, in bounded memory."""

from __future__ import annotations

from airflow_provider_siliconflow.batch_files.tally import ModelTally, Usage


def test_figures_add_up() -> None:
    one = ModelTally(rows=2, ok=1, usage=Usage(1, 2, 3, 4), finish_reasons={"stop": 1}, ok_in_round={0: 1})
    two = ModelTally(rows=1, error=1, finish_reasons={"length": 1, "stop": 2}, ok_in_round={0: 2, 1: 3})
    two.add(one)
    assert (two.rows, two.ok, two.error, two.usage) == (3, 1, 1, Usage(1, 2, 3, 4))
    assert (two.finish_reasons, two.ok_in_round) == ({"length": 1, "stop": 3}, {0: 3, 1: 3})


def test_only_so_many_messages_are_kept_apart() -> None:
    tally = ModelTally()
    for number in range(1000):
        tally.add_message(f"request {number} failed")
        tally.add_message("the usual")
    assert len(tally.messages) == 201
    assert sum(tally.messages.values()) == 2000
    assert tally.most_common_errors(1) == {"the usual": 1000}

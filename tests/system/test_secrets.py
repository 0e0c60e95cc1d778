"""Runs after all other system tests: none of their logs, database rows or files contains a secret."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.system.live import KEY, add_batch

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_provider_siliconflow.emulator.server import Emulator
    from scripts.live_airflow import LiveAirflow

pytestmark = pytest.mark.every_airflow


def test_nothing_written_contains_a_secret(
    live_airflow: LiveAirflow, live_emulator: Emulator, accounts: list[Emulator], rows: Path
) -> None:
    # Prove that the search can find something: the service does sign its URLs.
    batch_id = add_batch(live_emulator, rows)
    live_emulator.service.advance(3600)
    url = live_emulator.service.get_batch(batch_id)["output_file_id"]
    names = re.findall(r"[?&]([^=&]*[Ss]ignature)=", url)
    assert names
    signature = re.search(r"[Ss]ignature=(\w+)", url)
    assert signature is not None
    length = len(signature[1])
    wanted = re.compile("|".join([KEY, *(f"{name}=(?!\\*)" for name in names), "X-Amz-Credential"]))
    searched, found = 0, []
    for where, text in live_airflow.all_text():
        searched += 1
        if match := wanted.search(text):
            found.append((where, text[max(match.start() - 200, 0) : match.end() + 100]))
    assert not found, f"{len(found)} places, the first: {found[:5]}"
    assert searched > 1000
    assert length >= 16


def test_no_key_went_to_the_storage(accounts: list[Emulator]) -> None:
    downloads = sum(emulator.request_counts.get("GET storage", 0) for emulator in accounts)
    assert downloads
    assert [emulator.service.authorization_leaks for emulator in accounts] == [0] * len(accounts)

"""Running a trigger without a triggerer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from airflow.triggers.base import TriggerEvent

from airflow_provider_siliconflow.triggers.batch import BatchTrigger


def fire(trigger: BatchTrigger) -> TriggerEvent:
    """Run a trigger as a triggerer does: from what was stored of it; its one event."""
    path, arguments = trigger.serialize()
    assert path == "airflow_provider_siliconflow.triggers.batch.BatchTrigger"
    stored = BatchTrigger(**json.loads(json.dumps(arguments)))

    async def run() -> TriggerEvent:
        async with asyncio.timeout(30):
            events = [event async for event in stored.run()]
        assert len(events) == 1
        return events[0]

    return asyncio.run(run())


def payload(trigger: BatchTrigger) -> dict[str, Any]:
    """Run a trigger, and return what its event holds once it was stored and read again."""
    read: dict[str, Any] = json.loads(json.dumps(fire(trigger).payload))
    return read

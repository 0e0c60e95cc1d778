"""Fixtures for the tests of what comes from outside."""

from __future__ import annotations

import pytest

from airflow_provider_siliconflow.api import redaction
from tests.unit.boundary.hostile import ASK, Ask


@pytest.fixture(params=list(ASK))
def ask(request: pytest.FixtureRequest) -> Ask:
    """Carry out one call, with either client."""
    return ASK[request.param]


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the environment's proxies away."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def own_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the secrets that a test makes known, and those of others meanwhile."""
    monkeypatch.setattr(redaction, "_SECRETS", redaction._Secrets())

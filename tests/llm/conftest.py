"""Fixtures of the tests of llm/."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif.llm import retries


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Retry without delay. Returns the list of the delays that there would have been (after the last attempt too)."""
    real, delays = retries.retry_delay, list[float]()

    def wait(state: Any) -> float:
        delays.append(real(state))
        return 0.0

    monkeypatch.setattr(retries, "retry_delay", wait)
    return delays

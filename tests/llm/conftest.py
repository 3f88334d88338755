"""What the tests of llm/ share."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif.llm import client


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Retries without waiting. Gives the waits that there would have been (after the last attempt too)."""
    real, delays = client._retry_delay, list[float]()

    def wait(state: Any) -> float:
        delays.append(real(state))
        return 0.0

    monkeypatch.setattr(client, "_retry_delay", wait)
    return delays

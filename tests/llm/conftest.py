"""What the tests of llm/ share."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif.llm import client as clients


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Retries without waiting. Gives the waits that there would have been (after the last attempt too)."""
    real, wanted = clients._wait, list[float]()

    def wait(state: Any) -> float:
        wanted.append(real(state))
        return 0.0

    monkeypatch.setattr(clients, "_wait", wait)
    return wanted

"""Prices, and the meter that decides when to stop."""

from __future__ import annotations

import json
import time

import pytest

from rlaif.llm.pricing import has_known_price, is_local, request_cost
from rlaif.llm.stop_reason import StopReason
from rlaif.llm.usage import RECENT_REQUESTS, Usage, UsageMeter

LOOPBACK = ["http://127.0.0.1:8000/v1", "http://localhost:1/v1", "http://[::1]:8000/v1", "https://LOCALHOST/v1"]
PAID = [
    ("gpt-4o-mini", "https://api.openai.com/v1"),
    ("claude-3-5-haiku-latest", "https://api.anthropic.com/v1"),
    ("deepseek-chat", "https://api.deepseek.com/v1"),
]
UNKNOWN = [
    ("no-such-model-7b", "https://api.openai.com/v1"),
    ("gpt-4o-mini", "https://llm.example.org/v1"),
    ("m", "http://10.0.0.5:8000/v1"),
    ("m", "http://127.0.0.1.example.org/v1"),
    ("m", ""),
]


@pytest.mark.parametrize("url", LOOPBACK)
def test_local_servers_cost_nothing(url: str) -> None:
    assert is_local(url)
    assert request_cost("gpt-4o-mini", url, 1_000_000, 0, 1_000_000) == 0.0
    assert has_known_price("any", url)


@pytest.mark.parametrize(("model", "url"), PAID)
def test_a_paid_model_has_a_public_price(model: str, url: str) -> None:
    """Answers cost more than prompts, and a million tokens cost between 0.01 and 100 US dollars."""
    assert has_known_price(model, url)
    prompt, answer = request_cost(model, url, 1_000_000, 0, 0), request_cost(model, url, 0, 0, 1_000_000)
    assert prompt is not None
    assert answer is not None
    assert 0.01 < prompt < answer < 100
    assert request_cost(model, url, 1_000_000, 0, 1_000_000) == pytest.approx(prompt + answer)


def test_cached_tokens_cost_less() -> None:
    full = request_cost("gpt-4o-mini", "https://api.openai.com/v1", 10_000, 0, 10)
    cached = request_cost("gpt-4o-mini", "https://api.openai.com/v1", 10_000, 8_000, 10)
    assert full is not None
    assert cached is not None
    assert 0 < cached < full


@pytest.mark.parametrize(("model", "url"), UNKNOWN)
def test_an_unknown_price_is_none_and_not_zero(model: str, url: str) -> None:
    assert request_cost(model, url, 1000, 0, 1000) is None
    assert not has_known_price(model, url)


def test_the_meter_adds_up() -> None:
    usage = UsageMeter()
    usage.add(Usage(10, 5, 3, 0.25))
    usage.add(Usage(1, 0, 1, 0.5))
    usage.record_success(2)
    usage.record_failure("endpoint", "lost", 3)
    summary = usage.summary()
    json.dumps(summary)
    assert {name: summary[name] for name in summary if not name.endswith(("seconds", "_s"))} == {
        "requests": 2,
        "answers": 2,
        "failures": {"endpoint": 3},
        "retries": 0,
        "prompt_tokens": 11,
        "cached_tokens": 5,
        "completion_tokens": 4,
        "cost_usd": 0.75,
    }
    assert usage.failed == 3


def test_reasons_to_stop() -> None:
    assert UsageMeter().stop_reason() is None
    assert UsageMeter(budget_usd=1, cost_usd=0.99).stop_reason() is None
    assert UsageMeter(budget_usd=1, cost_usd=1).stop_reason() is StopReason.BUDGET
    assert UsageMeter(deadline=time.monotonic() + 60).stop_reason() is None
    assert UsageMeter(deadline=time.monotonic()).stop_reason() is StopReason.DEADLINE
    assert UsageMeter(interrupted=True).stop_reason() is StopReason.INTERRUPTED


def test_mostly_failing_looks_at_the_last_requests() -> None:
    usage = UsageMeter()
    for _ in range(RECENT_REQUESTS - 1):
        usage.record_failure("endpoint", "lost")
        assert not usage.mostly_failing()  # too few to decide
    usage.record_failure("endpoint", "lost")
    assert usage.mostly_failing()
    for _ in range(3):
        usage.record_success(1)
    assert not usage.mostly_failing()
    for _ in range(RECENT_REQUESTS):
        usage.record_failure("endpoint", "too long", rejected=True)
    assert not usage.mostly_failing()  # rejections by a healthy server
    for _ in range(RECENT_REQUESTS):
        usage.record_failure("endpoint", "lost")
    assert usage.mostly_failing()  # earlier requests no longer count
    assert usage.failed == RECENT_REQUESTS + 2 * RECENT_REQUESTS

"""Prices, and the meter that says when to stop."""

from __future__ import annotations

import json
import time

import pytest

from rlaif.llm.budget import RECENT, Meter, Usage, is_local, is_priced, price

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
def test_this_machine_costs_nothing(url: str) -> None:
    assert is_local(url)
    assert price("gpt-4o-mini", url, 1_000_000, 0, 1_000_000) == 0.0
    assert is_priced("any", url)


@pytest.mark.parametrize(("model", "url"), PAID)
def test_a_paid_model_has_the_price_of_the_public_list(model: str, url: str) -> None:
    """In US dollars: answers cost more than prompts, more costs more, and a million tokens are between 0.01 and 100."""
    assert is_priced(model, url)
    prompt, answer = price(model, url, 1_000_000, 0, 0), price(model, url, 0, 0, 1_000_000)
    assert prompt is not None
    assert answer is not None
    assert 0.01 < prompt < answer < 100
    assert price(model, url, 1_000_000, 0, 1_000_000) == pytest.approx(prompt + answer)


def test_cached_tokens_cost_less() -> None:
    full = price("gpt-4o-mini", "https://api.openai.com/v1", 10_000, 0, 10)
    cached = price("gpt-4o-mini", "https://api.openai.com/v1", 10_000, 8_000, 10)
    assert full is not None
    assert cached is not None
    assert 0 < cached < full


@pytest.mark.parametrize(("model", "url"), UNKNOWN)
def test_where_no_price_is_known_it_is_none_and_not_nothing(model: str, url: str) -> None:
    assert price(model, url, 1000, 0, 1000) is None
    assert not is_priced(model, url)


def test_the_meter_adds_up() -> None:
    meter = Meter()
    meter.count(Usage(10, 5, 3, 0.25))
    meter.count(Usage(1, 0, 1, 0.5))
    meter.succeeded(2)
    meter.failed_with("endpoint", "lost", 3)
    facts = meter.facts()
    json.dumps(facts)
    assert {name: facts[name] for name in facts if not name.endswith(("seconds", "_s"))} == {
        "requests": 2, "answers": 2, "failures": {"endpoint": 3}, "retries": 0, "prompt_tokens": 11,
        "cached_tokens": 5, "completion_tokens": 4, "usd": 0.75}  # fmt: skip
    assert meter.failed == 3


def test_reasons_to_stop() -> None:
    assert Meter().reason_to_stop() is None
    assert Meter(budget_usd=1, usd=0.99).reason_to_stop() is None
    assert Meter(budget_usd=1, usd=1).reason_to_stop() == "the budget of $1 is spent"
    assert Meter(deadline=time.monotonic() + 60).reason_to_stop() is None
    assert Meter(deadline=time.monotonic()).reason_to_stop() == "the deadline is reached"
    assert Meter(interrupted=True).reason_to_stop() == "interrupted"


def test_hopeless_is_nearly_all_of_the_recent_ones() -> None:
    meter = Meter()
    for _ in range(RECENT - 1):
        meter.failed_with("endpoint", "lost")
        assert not meter.hopeless()  # too few to say
    meter.failed_with("endpoint", "lost")
    assert meter.hopeless()
    for _ in range(3):
        meter.succeeded(1)
    assert not meter.hopeless()
    for _ in range(RECENT):
        meter.failed_with("endpoint", "too long", refused=True)
    assert not meter.hopeless()  # of a server that is well
    for _ in range(RECENT):
        meter.failed_with("endpoint", "lost")
    assert meter.hopeless()  # whatever was before
    assert meter.failed == RECENT + 2 * RECENT

"""Receivers of a stage's log lines and progress: the protocol that the console, tests and notebooks implement."""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import urlsplit

from rlaif.format import format_count, format_duration
from rlaif.llm.usage import UsageMeter


class Reporter(Protocol):
    """Receives log lines and request progress."""

    def log(self, line: str) -> None:
        """Show one log line."""

    def progress(self, usage: UsageMeter) -> Any:
        """Return a context manager that shows ``usage`` while it is open."""


def progress_line(usage: UsageMeter) -> str:
    """Return one line: done of total, rate, time left, tokens, dollars, server status, retries, failures."""
    done, rate = usage.answers + usage.skipped, usage.rate()
    parts = [f"{usage.description}: {done:,}" + (f" of {usage.total:,}" if usage.total else "")]
    parts.append(f"{rate:.1f}/s" if rate < 100 else f"{rate:,.0f}/s")
    if usage.total and rate and usage.total > done:
        parts.append(f"{format_duration((usage.total - done) / rate)} left")
    parts.append(f"{format_count(usage.prompt_tokens)} + {format_count(usage.completion_tokens)} tokens")
    if usage.cost_usd:
        parts.append(f"${usage.cost_usd:,.4f}")
    if usage.waiting_for:
        parts.append(usage.waiting_for)
    if usage.server_status:
        parts.append(usage.server_status)
    if usage.endpoints_down:
        parts.append(f"down: {', '.join(urlsplit(url).netloc for url in usage.endpoints_down)}")
    if usage.retries:
        parts.append(f"{usage.retries} retries")
    if usage.failed:
        parts.append(f"{usage.failed} failed")
    return ", ".join(parts)

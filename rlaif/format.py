"""Durations and counts as short text, for progress lines, reports and plans."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that fits: ``75 s``, ``12 min``, ``3 h 05 min``, ``2.5 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 48 * 60 else format_days(seconds / 3600)


def format_days(hours: float) -> str:
    """Return hours as days of 24 hours, with one decimal below ten days."""
    return f"{hours / 24:,.{1 if hours < 240 else 0}f} days"


def format_count(count: float) -> str:
    """Return a count in a few characters: ``9,999``, ``123k``, ``1.2M``."""
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 1e3:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"

"""Prices of requests in US dollars, from the public price list of the package genai-prices."""

from __future__ import annotations

import functools
from urllib.parse import urlsplit


def is_local(url: str) -> bool:
    """Return True if ``url`` points to this machine's loopback."""
    return (urlsplit(url).hostname or "") in {"127.0.0.1", "localhost", "::1"}


@functools.cache
def has_known_price(model: str, url: str) -> bool:
    """Return True if :func:`request_cost` knows the price of ``model`` at ``url``. Local servers cost nothing."""
    return is_local(url) or request_cost(model, url, 1000, 0, 1000) is not None


def request_cost(model: str, url: str, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float | None:
    """Return the cost of one request in US dollars: 0.0 for a local server, None if no price is known."""
    if is_local(url):
        return 0.0
    import genai_prices

    usage = genai_prices.Usage(
        input_tokens=prompt_tokens, cache_read_tokens=cached_tokens or None, output_tokens=completion_tokens
    )
    try:
        return float(genai_prices.calc_price(usage, model, provider_api_url=url).total_price)
    except LookupError:
        return None

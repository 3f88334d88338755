"""The check of an endpoint before anything is paid for: is it up, does it accept the key, does it serve the model?"""

from __future__ import annotations

from typing import Any

from rlaif.errors import EndpointError, did_you_mean
from rlaif.llm import chat_protocol, http_status
from rlaif.llm.api_key import ApiKey
from rlaif.llm.chat_protocol import MalformedResponseError
from rlaif.llm.endpoint import ConnectionLostError, Endpoint, HTTPStatusError
from rlaif.llm.retries import Retries, is_retryable

MODEL_LIST_TIMEOUT_S = 30.0


class EndpointUnavailableError(EndpointError):
    """No server answers at the endpoint now; it may become available later."""


async def check_endpoint(endpoint: Endpoint, model: str, key: ApiKey, retries: Retries, timeout_s: float) -> bool:
    """Request the endpoint's list of models, and return True if it names vLLM as their owner.

    If the server lists no models, the first request decides. A list that fails with a retryable status is not taken
    for an empty one. Raises :class:`EndpointUnavailableError` if no server answers, and :class:`EndpointError` if the
    key is rejected or the model is not listed.
    """
    try:
        response = chat_protocol.parse_json(
            await retries.call(_request_models, endpoint, key, min(MODEL_LIST_TIMEOUT_S, timeout_s)), key.redact
        )
    except HTTPStatusError as error:
        if error.status in http_status.KEY_REJECTED:
            raise key.rejected_error(endpoint.url, error.status) from None
        if is_retryable(error):
            raise EndpointUnavailableError(
                f"the server is unavailable (HTTP {error.status}: {key.excerpt(error.message)})",
                location=endpoint.url,
                hint="Rerun the same command when it is available again.",
            ) from None
        return False
    except MalformedResponseError:
        return False
    cards = _model_cards(response)
    names = [str(card.get("id")) for card in cards]
    if names and model not in names:
        suggestion = did_you_mean(model, names[:50])
        raise EndpointError(f"the server has no model {model!r}. {suggestion}", location=endpoint.url)
    endpoint.is_vllm = any(card.get("owned_by") == "vllm" for card in cards)
    return endpoint.is_vllm


def _model_cards(response: Any) -> list[dict[str, Any]]:
    models = response.get("data") if isinstance(response, dict) else None
    return [card for card in models if isinstance(card, dict)] if isinstance(models, list) else []


async def _request_models(endpoint: Endpoint, key: ApiKey, timeout_s: float) -> bytes:
    try:
        return await endpoint.send("GET", "/models", timeout_s)
    except ConnectionLostError as error:  # not retried: usually the URL is wrong
        reason = str(error).removeprefix("connection lost (").removesuffix(")")
        raise EndpointUnavailableError(
            f"the server is unreachable ({key.excerpt(reason)})",
            location=endpoint.url,
            hint="Start the server or fix `--base-url`. Without `--base-url`, rlaif starts vLLM itself.",
        ) from None

"""A provider's batch API over HTTP: upload a file of requests, create a batch, look it up, download the results."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from rlaif.errors import EndpointError
from rlaif.llm import chat_protocol
from rlaif.llm.client import Client
from rlaif.llm.request import RequestFailedError

CHAT_ENDPOINT = "/v1/chat/completions"
COMPLETION_WINDOW = "24h"
JOB_METADATA_KEY = "rlaif"
NOT_FOUND = "not found"
"""The status of a batch that the provider does not know, in the words of rlaif."""
FINAL_STATUSES = ("completed", "failed", "expired", "cancelled")


class BatchApi:
    """Files and batches at the first endpoint of ``client``. Every call is retried as a chat request is."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._endpoint = client.endpoints[0]

    @property
    def url(self) -> str:
        return self._endpoint.url

    async def upload_file(self, name: str, data: bytes) -> str:
        """Upload a file of requests and return its id. Raises :class:`EndpointError`."""

        async def upload() -> Any:
            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            form.add_field("file", data, filename=name, content_type="application/jsonl")
            response = await self._endpoint.send("POST", "/files", self._client.config.timeout_s, form, json=False)
            return chat_protocol.parse_json(response, self._client.api_key.redact)

        return await self._create(upload, "file")

    async def create_batch(self, file_id: str, job_key: str) -> str:
        """Create the batch of one job and return its id. Raises :class:`EndpointError`.

        ``job_key`` travels as metadata, so that a batch whose id was lost can be found again.
        """
        body = {
            "input_file_id": file_id,
            "endpoint": CHAT_ENDPOINT,
            "completion_window": COMPLETION_WINDOW,
            "metadata": {JOB_METADATA_KEY: job_key},
        }
        tried = False

        async def create() -> Any:
            nonlocal tried
            if tried:  # the first attempt may have succeeded although its reply was lost
                async for batch in self.list_batches():
                    if job_key_of(batch) == job_key:
                        return batch
            tried = True
            return await self._request_json("POST", "/batches", orjson.dumps(body))

        return await self._create(create, "batch")

    async def list_batches(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the provider's batches, the newest first. Raises :class:`RequestFailedError`."""
        after = ""
        while True:
            page = await self._call("GET", f"/batches?limit=100{after}")
            batches = [entry for entry in page.get("data") or [] if isinstance(entry, dict) and entry.get("id")]
            for batch in batches:
                yield batch
            if not page.get("has_more") or not batches:
                return
            after = f"&after={batches[-1]['id']}"

    async def get_batch(self, batch_id: str | None) -> dict[str, Any]:
        """Return a batch, with the status :data:`NOT_FOUND` if the provider does not know it, and "unknown" if the
        reply cannot be read. Raises :class:`RequestFailedError`."""
        try:
            batch = await self._call("GET", f"/batches/{batch_id}")
        except RequestFailedError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return {"status": NOT_FOUND, "message": str(error)}
            raise
        return {**batch, "status": str(batch.get("status"))} if isinstance(batch, dict) else {"status": "unknown"}

    async def download_file(self, file_id: str, path: Path) -> None:
        """Write a file of results to ``path``. Raises :class:`RequestFailedError` or OSError."""
        await self._client.with_retries(lambda: self._endpoint.download(f"/files/{file_id}/content", path))

    async def _create(self, call: Callable[[], Awaitable[Any]], kind: str) -> str:
        try:
            value = await self._client.with_retries(call)
        except RequestFailedError as error:
            raise EndpointError(
                f"the batch API did not accept a {kind}: {error}",
                location=self.url,
                hint="Rerun the same command, or drop `--batch`. Nothing is lost.",
            ) from None
        if not isinstance(value, dict) or not isinstance(value.get("id"), str):
            excerpt = self._client.api_key.redact(str(value))[:200]
            raise EndpointError(f"the batch API returned a {kind} without an id: {excerpt}", location=self.url)
        return str(value["id"])

    async def _call(self, method: str, path: str) -> Any:
        return await self._client.with_retries(functools.partial(self._request_json, method, path))

    async def _request_json(self, method: str, path: str, data: bytes | None = None) -> Any:
        response = await self._endpoint.send(method, path, self._client.config.timeout_s, data)
        return chat_protocol.parse_json(response, self._client.api_key.redact)


def job_key_of(batch: dict[str, Any]) -> str:
    """Return the key of the job that a batch was created for, or "" if rlaif did not create it."""
    metadata = batch.get("metadata")
    return str(metadata.get(JOB_METADATA_KEY)) if isinstance(metadata, dict) else ""


def error_summary(batch: dict[str, Any]) -> str:
    """Return the first three errors of a failed batch in one line."""
    entries = _error_entries(batch)[:3]
    messages = [
        f"{entry.get('message')}" + (f" (line {entry['line']})" if entry.get("line") else "") for entry in entries
    ]
    return "; ".join(messages) or "no reason given"


def exceeds_token_limit(batch: dict[str, Any]) -> bool:
    """Return True if a batch failed because the provider limits the tokens that may be queued."""
    return any(entry.get("code") == "token_limit_exceeded" for entry in _error_entries(batch))


def _error_entries(batch: dict[str, Any]) -> list[dict[str, Any]]:
    errors = batch.get("errors")
    entries = errors.get("data") or [] if isinstance(errors, dict) else []
    return [entry for entry in entries if isinstance(entry, dict)]

"""OpenAI's files and batches, as documented, over the scripted server: for what a day at a provider looks like.

``script`` gives the course of each new batch: the statuses that it is found in, one a look, the last for ever.
``fate(body)`` decides each line's: "answer" (by the server's own ``answer``), an HTTP status, "expired", or "lost" (in
neither file). Files come back in another order than they were sent.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.scripted import Answer, Fault, ScriptedServer, _faulty, echo, usage_of

CALM = ["validating", "in_progress", "finalizing", "completed"]
TIMES = {"in_progress": "in_progress_at", "finalizing": "finalizing_at", "completed": "completed_at",
         "failed": "failed_at", "expired": "expired_at", "cancelling": "cancelling_at",
         "cancelled": "cancelled_at"}  # fmt: skip


class BatchServer(ScriptedServer):
    """``before(what)`` may return a :class:`Fault` in place of a reply; what is upload | create | created | list |
    look | download. A fault at "created" comes after the batch was made: its answer is lost."""

    def __init__(self, answer: Answer = echo, **options: Any) -> None:
        super().__init__(answer, owned_by="other", **options)
        self.script: Callable[[int], list[str]] = lambda number: CALM
        self.fate: Callable[[dict[str, Any]], Any] = lambda body: "answer"
        self.before: Callable[[str], Fault | None] = lambda what: None
        self.failure: list[dict[str, Any]] = [{"code": "invalid_json_line", "message": "Line 3 is no JSON.", "line": 3}]
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.courses: dict[str, list[str]] = {}
        self.missing: dict[str, Fault] = {}
        """What is said of batches that are not shown."""
        self.asked: Counter[str] = Counter()
        self.lines: list[dict[str, Any]] = []
        """Every line of every batch that was made."""

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._download)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._look)

    async def _first(self, what: str, request: web.Request) -> web.StreamResponse | None:
        self.asked[what] += 1
        fault = self.before(what)
        return await _faulty(request, fault) if fault else self._forbidden(request)

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        if refused := await self._first("upload", request):
            return refused
        assert form["purpose"] == "batch"
        name, data = form["file"].filename, form["file"].file.read()  # type: ignore[union-attr]
        assert name.endswith(".jsonl")
        number = f"file-{len(self.files)}"
        self.files[number] = data
        return web.json_response({"id": number, "object": "file", "bytes": len(data), "created_at": int(time.time()),
                                  "filename": name, "purpose": "batch", "status": "processed"})  # fmt: skip

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if refused := await self._first("create", request):
            return refused
        assert set(body) == {"input_file_id", "endpoint", "completion_window", "metadata"}
        assert body["endpoint"] == "/v1/chat/completions"
        assert body["completion_window"] == "24h"
        assert all(isinstance(value, str) and len(value) <= 512 for value in body["metadata"].values())
        number = f"batch_{len(self.batches)}"
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines) <= 50_000
        assert all(line["method"] == "POST" and line["url"] == body["endpoint"] for line in lines)
        self.lines += lines
        self.courses[number] = list(self.script(len(self.batches)))
        self.batches[number] = {
            "id": number, "object": "batch", "endpoint": body["endpoint"], "errors": None,
            "input_file_id": body["input_file_id"], "completion_window": "24h", "status": "validating",
            "output_file_id": None, "error_file_id": None, "created_at": int(time.time()),
            "expires_at": int(time.time()) + 86_400, "metadata": body["metadata"],
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0}, **dict.fromkeys(TIMES.values()),
        }  # fmt: skip
        return await self._first("created", request) or web.json_response(self.batches[number])

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if refused := await self._first("list", request):
            return refused
        found = list(reversed(self.batches.values()))
        ids = [batch["id"] for batch in found]
        start = ids.index(request.query["after"]) + 1 if "after" in request.query else 0
        page = found[start : start + 2]  # smaller than asked for, so that paging is seen
        return web.json_response({"object": "list", "data": page, "has_more": start + 2 < len(found),
                                  "first_id": page[0]["id"] if page else None,
                                  "last_id": page[-1]["id"] if page else None})  # fmt: skip

    async def _look(self, request: web.Request) -> web.StreamResponse:
        if refused := await self._first("look", request):
            return refused
        if request.match_info["id"] in self.missing:
            return await _faulty(request, self.missing[request.match_info["id"]])
        batch = self.batches[request.match_info["id"]]
        course = self.courses[batch["id"]]
        status = course.pop(0) if len(course) > 1 else course[0]
        if status != batch["status"]:
            batch["status"] = status
            batch[TIMES.get(status, "in_progress_at")] = int(time.time())
            if status == "failed":
                batch["errors"] = {"object": "list", "data": self.failure}
            if status in ("completed", "expired", "cancelled"):
                self._finish(batch)
        return web.json_response(batch)

    def _finish(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for number, line in enumerate(reversed(self.files[batch["input_file_id"]].splitlines())):
            asked = json.loads(line)
            fate = self.fate(asked["body"])
            said = {"id": f"batch_req_{number}", "custom_id": asked["custom_id"], "response": None, "error": None}
            if fate == "lost":
                continue
            if fate == "expired":
                bad.append({**said, "error": {"code": "batch_expired", "message": "This request could not be executed "
                                              "before the completion window expired."}})  # fmt: skip
            elif isinstance(fate, int):
                body = {"error": {"message": f"scripted {fate}", "type": "x", "param": None, "code": None}}
                bad.append({**said, "response": {"status_code": fate, "request_id": "r", "body": body}})
            else:
                body = self.answer(asked["body"])
                if isinstance(body, list):
                    texts = [{"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                             for i, text in enumerate(body)]  # fmt: skip
                    body = {"choices": texts, "usage": usage_of(asked["body"], body)}
                assert isinstance(body, dict)
                value = {"id": "x", "object": "chat.completion", "model": asked["body"]["model"], **body}
                good.append({**said, "response": {"status_code": 200, "request_id": "r", "body": value}})
        batch["request_counts"].update(completed=len(good), failed=len(bad))
        for name, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    async def _download(self, request: web.Request) -> web.StreamResponse:
        if refused := await self._first("download", request):
            return refused
        return web.Response(body=self.files[request.match_info["id"]], content_type="application/octet-stream")

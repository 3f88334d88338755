"""A fake of OpenAI's files and batches, as documented, on top of the scripted server.

``script`` returns the course of each new batch: its status at each poll; the last one stays. ``fate(body)`` decides the
result of each line: "answer" (from the server's ``answer``), an HTTP status, "expired", or "lost" (in neither file).
Result files have another order than the requests.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.fake_server import Answer, Fault, ScriptedServer, echo, send_fault, usage_of

NORMAL_COURSE = ["validating", "in_progress", "finalizing", "completed"]
TIMESTAMP_FIELDS = {"in_progress": "in_progress_at", "finalizing": "finalizing_at", "completed": "completed_at",
         "failed": "failed_at", "expired": "expired_at", "cancelling": "cancelling_at",
         "cancelled": "cancelled_at"}  # fmt: skip


class BatchServer(ScriptedServer):
    """A server with a batch API. ``fault_at(step)`` may return a :class:`Fault` to send in place of a reply.

    Steps: upload, create, created, list, look, download. A fault at "created" occurs after the batch was created, so
    only the reply is lost.
    """

    def __init__(self, answer: Answer = echo, **options: Any) -> None:
        super().__init__(answer, owned_by="other", **options)
        self.script: Callable[[int], list[str]] = lambda index: NORMAL_COURSE
        self.fate: Callable[[dict[str, Any]], Any] = lambda body: "answer"
        self.fault_at: Callable[[str], Fault | None] = lambda step: None
        self.failure: list[dict[str, Any]] = [
            {"code": "invalid_json_line", "message": "Line 3 is not JSON.", "line": 3}
        ]
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.courses: dict[str, list[str]] = {}
        self.missing: dict[str, Fault] = {}
        """Replies for batches that are not shown, by id."""
        self.step_counts: Counter[str] = Counter()
        self.lines: list[dict[str, Any]] = []
        """All lines of all batches that were created."""

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._download)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._retrieve)

    async def _count_step(self, step: str, request: web.Request) -> web.StreamResponse | None:
        self.step_counts[step] += 1
        fault = self.fault_at(step)
        return await send_fault(request, fault) if fault else self._reject_wrong_key(request)

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        if rejection := await self._count_step("upload", request):
            return rejection
        assert form["purpose"] == "batch"
        name, data = form["file"].filename, form["file"].file.read()  # type: ignore[union-attr]
        assert name.endswith(".jsonl")
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = data
        return web.json_response(
            {
                "id": file_id,
                "object": "file",
                "bytes": len(data),
                "created_at": int(time.time()),
                "filename": name,
                "purpose": "batch",
                "status": "processed",
            }
        )

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if rejection := await self._count_step("create", request):
            return rejection
        assert set(body) == {"input_file_id", "endpoint", "completion_window", "metadata"}
        assert body["endpoint"] == "/v1/chat/completions"
        assert body["completion_window"] == "24h"
        assert all(isinstance(value, str) and len(value) <= 512 for value in body["metadata"].values())
        batch_id = f"batch_{len(self.batches)}"
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines) <= 50_000
        assert all(line["method"] == "POST" and line["url"] == body["endpoint"] for line in lines)
        self.lines += lines
        self.courses[batch_id] = list(self.script(len(self.batches)))
        self.batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": body["endpoint"],
            "errors": None,
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            "expires_at": int(time.time()) + 86_400,
            "metadata": body["metadata"],
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            **dict.fromkeys(TIMESTAMP_FIELDS.values()),
        }
        return await self._count_step("created", request) or web.json_response(self.batches[batch_id])

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if rejection := await self._count_step("list", request):
            return rejection
        batches = list(reversed(self.batches.values()))
        ids = [batch["id"] for batch in batches]
        start = ids.index(request.query["after"]) + 1 if "after" in request.query else 0
        page = batches[start : start + 2]  # smaller than requested, so that paging is tested
        return web.json_response(
            {
                "object": "list",
                "data": page,
                "has_more": start + 2 < len(batches),
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            }
        )

    async def _retrieve(self, request: web.Request) -> web.StreamResponse:
        if rejection := await self._count_step("look", request):
            return rejection
        if request.match_info["id"] in self.missing:
            return await send_fault(request, self.missing[request.match_info["id"]])
        batch = self.batches[request.match_info["id"]]
        course = self.courses[batch["id"]]
        status = course.pop(0) if len(course) > 1 else course[0]
        if status != batch["status"]:
            batch["status"] = status
            batch[TIMESTAMP_FIELDS.get(status, "in_progress_at")] = int(time.time())
            if status == "failed":
                batch["errors"] = {"object": "list", "data": self.failure}
            if status in ("completed", "expired", "cancelled"):
                self._finish(batch)
        return web.json_response(batch)

    def _finish(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for index, line in enumerate(reversed(self.files[batch["input_file_id"]].splitlines())):
            request = json.loads(line)
            fate = self.fate(request["body"])
            result = {"id": f"batch_req_{index}", "custom_id": request["custom_id"], "response": None, "error": None}
            if fate == "lost":
                continue
            if fate == "expired":
                bad.append(
                    {
                        **result,
                        "error": {
                            "code": "batch_expired",
                            "message": "This request could not be executed before the completion window expired.",
                        },
                    }
                )
            elif isinstance(fate, int):
                body = {"error": {"message": f"scripted {fate}", "type": "x", "param": None, "code": None}}
                bad.append({**result, "response": {"status_code": fate, "request_id": "r", "body": body}})
            else:
                body = self.answer(request["body"])
                if isinstance(body, list):
                    texts = [
                        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                        for i, text in enumerate(body)
                    ]
                    body = {"choices": texts, "usage": usage_of(request["body"], body)}
                assert isinstance(body, dict)
                value = {"id": "x", "object": "chat.completion", "model": request["body"]["model"], **body}
                good.append({**result, "response": {"status_code": 200, "request_id": "r", "body": value}})
        batch["request_counts"].update(completed=len(good), failed=len(bad))
        for name, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    async def _download(self, request: web.Request) -> web.StreamResponse:
        if rejection := await self._count_step("download", request):
            return rejection
        return web.Response(body=self.files[request.match_info["id"]], content_type="application/octet-stream")

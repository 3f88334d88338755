"""Shared by tests of the review page: a judged run, the page started by its command, and a browser."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlaif import api
from rlaif.config.loader import load
from rlaif.llm.backends import ModelBackends
from rlaif.run.run import Run
from tests.conftest import ROOT, command, skip_missing, write_jsonl
from tests.fake_judge import judge_by
from tests.fake_server import ScriptedServer

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
AXE = ROOT / ".venv" / "axe" / "package" / "axe.min.js"


QUIET = SimpleNamespace(log=lambda line: None, progress=lambda usage: contextlib.nullcontext())


def prompt_rows(n: int) -> list[dict[str, Any]]:
    """Return prompts with two answers each; the scripted judge prefers the answer that contains "good"."""
    topics = ["bread", "rivers", "chess", "clouds", "maps", "tea", "bridges", "bees", "paper", "glass", "salt"]
    return [{"prompt": f"Tell me thing number {i} about {topics[i % 11]}.",
             "responses": [f"A **good** answer about {topics[i % 11]}, number {i}.", f"A poor one, number {i}."]}
            for i in range(n)]  # fmt: skip


def judged_run(path: Path, prompts: list[dict[str, Any]], **flags: Any) -> Run:
    """Return a run judged by a scripted judge, with all pairs in the review queue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(path.parent / f"{path.name}-rows.jsonl", prompts)
    run = Run(path)
    chosen = {
        "judge.panel": ["helpful"],
        "judge.model": "m",
        "prompts.near_duplicate_threshold": 0,
        "pairs.human_fraction": 1.0,
        "pairs.test_fraction": 0.1,
        "prompts.heldout_fraction": 0,
        **flags,
    }
    with ScriptedServer(judge_by(lambda text: 0.9 if "good" in text else 0.1)) as server:
        config = load(run.path, {**chosen, "judge.base_url": [server.url]})
        with ModelBackends(run.log, config.client, lambda line: None) as engines:
            api.import_completions(run, config, str(source), QUIET)
            api.judge(run, config, QUIET, engines)
    return run


class PageServer:
    """``rlaif review RUN ...`` as a process. ``links``: the printed URLs by annotator's name."""

    def __init__(self, run: Path, *options: str, port: int = 0) -> None:
        self.process = subprocess.Popen(
            command("review", run, "--port", str(port), *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self.process.stdout
        self.links: dict[str, str] = {}
        for line in self.process.stdout:
            name, _, link = line.strip().partition(": ")
            self.links[name] = link
            if name == "lead":
                break
        else:
            assert self.process.stderr
            raise AssertionError(self.process.stderr.read())
        self.port = int(link.split("/")[2].rpartition(":")[2])

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.stderr = self.process.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def request(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Send a request; return status, body (decoded if it is JSON) and headers."""
        data = None if body is None else json.dumps(body).encode()
        request_headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            request_headers.setdefault("Content-Type", "application/json")
        url = path if path.startswith("http") else f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, request_headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                status, text, response_headers = response.status, response.read(), dict(response.headers)
        except urllib.error.HTTPError as error:
            status, text, response_headers = error.code, error.read(), dict(error.headers)
        is_json = response_headers.get("content-type", "").startswith("application/json")
        return status, json.loads(text) if is_json else text.decode(), response_headers


def needs_browser() -> None:
    """Skip the test if Chromium or axe-core is missing; under CI that is an error."""
    missing = [name for name, available in (("chromium", CHROMIUM), ("axe-core", AXE.exists())) if not available]
    if missing:
        skip_missing(" or ".join(missing))

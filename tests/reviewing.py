"""What tests of the review page share: a judged run, the page as people start it, and a browser."""

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

from rlaif import pipeline
from rlaif.llm.engines import Engines
from rlaif.run.directory import Run
from rlaif.settings import load
from tests.conftest import ROOT, absent, command, write_jsonl
from tests.judging import judge_by
from tests.scripted import ScriptedServer

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
AXE = ROOT / ".venv" / "axe" / "package" / "axe.min.js"


QUIET = SimpleNamespace(say=lambda line: None, watch=lambda meter: contextlib.nullcontext())


def rows(n: int) -> list[dict[str, Any]]:
    """Prompts with two answers each; the one that says "good" is the one that the scripted judge prefers."""
    topics = ["bread", "rivers", "chess", "clouds", "maps", "tea", "bridges", "bees", "paper", "glass", "salt"]
    return [{"prompt": f"Tell me thing number {i} about {topics[i % 11]}.",
             "responses": [f"A **good** answer about {topics[i % 11]}, number {i}.", f"A poor one, number {i}."]}
            for i in range(n)]  # fmt: skip


def judged_run(path: Path, prompts: list[dict[str, Any]], **flags: Any) -> Run:
    """A run whose pairs all go to people, judged by a scripted judge."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(path.parent / f"{path.name}-rows.jsonl", prompts)
    run = Run(path)
    chosen = {"judge.judges": ["helpful"], "judge.model": "m", "prompts.near_duplicates": 0, "pairs.human_share": 1.0,
              "pairs.test_share": 0.1, "prompts.heldout_share": 0, **flags}  # fmt: skip
    with ScriptedServer(judge_by(lambda text: 0.9 if "good" in text else 0.1)) as server:
        config = load(run.path, {**chosen, "judge.base_url": [server.url]})
        with Engines(run.log, config.client, lambda line: None) as engines:
            pipeline.import_completions(run, config, str(source), QUIET)
            pipeline.judge(run, config, QUIET, engines)
    return run


class PageServer:
    """``rlaif review RUN ...`` as a process; ``links`` by name once it answers."""

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
            self.said = self.process.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is some) and headers of a request."""
        data = None if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            named.setdefault("Content-Type", "application/json")
        url = path if path.startswith("http") else f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, named)
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                status, text, got = reply.status, reply.read(), dict(reply.headers)
        except urllib.error.HTTPError as error:
            status, text, got = error.code, error.read(), dict(error.headers)
        is_json = got.get("content-type", "").startswith("application/json")
        return status, json.loads(text) if is_json else text.decode(), got


def needs_browser() -> None:
    """Skip without Chromium; under CI a missing part is an error."""
    missing = [name for name, there in (("chromium", CHROMIUM), ("axe-core", AXE.exists())) if not there]
    if missing:
        absent(" or ".join(missing))

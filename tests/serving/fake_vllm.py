"""A fake vLLM that ignores SIGTERM and has a grandchild that ignores it too.

``python fake_vllm.py PLAN --port P ...``. Each start removes the first line of the file PLAN, which is its action:

    serve [S]      answers /health and /v1 after S seconds; the grandchild outlives its parent
    generate R     like serve, and generates R tokens/s for all requests together, counted in /metrics as in vLLM
    crash LOG      prints the file LOG as vLLM would and exits with 1
    killed         dies of SIGKILL without output
    silent         never listens
    unhealthy      listens, and /health returns 503; SIGUSR1 puts "serve" into this state

After SIGUSR2, a "serve" or "generate" is healthy by /health but answers no requests, as if its engine hung; a second
SIGUSR2 ends that. Each request is printed, so that the log shows how many arrived.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def next_action(plan: Path) -> list[str]:
    first, _, rest = plan.read_text().partition("\n")
    plan.write_text(rest or first)  # the last line is repeated
    return first.split(maxsplit=1)


class Engine:
    """Generates ``rate`` tokens per second, shared by the running requests."""

    def __init__(self, rate: float) -> None:
        self.rate, self.running, self.generated = rate, 0, 0
        self._lock = threading.Lock()

    def generate(self, tokens: int) -> None:
        with self._lock:
            self.running += 1
        for _ in range(tokens):
            time.sleep(self.running / self.rate)
            while Handler.hangs.is_set():
                time.sleep(0.02)
            with self._lock:
                self.generated += 1
        with self._lock:
            self.running -= 1

    def metrics(self) -> str:
        labels = '{engine="0",model_name="some/model"}'
        return (
            f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{labels} {self.running}.0\n"
            f"vllm:num_requests_waiting{labels} 0.0\nvllm:prompt_tokens_total{labels} 7.0\n"
            f"vllm:generation_tokens_total{labels} {self.generated}.0\n"
            f"vllm:generation_tokens_created{labels} 1.7955e+09\n"
        )


def text_choice(text: str) -> dict[str, Any]:
    return {"message": {"content": text}, "finish_reason": "stop"}


def verdict_choice(words: list[str]) -> dict[str, Any]:
    """Return the first word, as from a judge that is nearly sure of it."""
    top = [{"token": word, "logprob": -0.1 if word == words[0] else -3.0} for word in words]
    return {**text_choice(words[0]), "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


class Handler(BaseHTTPRequestHandler):
    health = 200
    hangs = threading.Event()
    engine: Engine | None = None

    def do_GET(self) -> None:
        if self.path == "/metrics" and self.engine:
            self.send(200, "text/plain", self.engine.metrics().encode())
            return
        model = sys.argv[sys.argv.index("--served-model-name") + 1]
        body = {"data": [{"id": model, "owned_by": "vllm"}]} if self.path == "/v1/models" else {}
        allowed = self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"
        self.reply(self.health if self.path == "/health" else 200 if allowed else 401, body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        sys.stdout.write(f"fake_vllm: asked {body['messages'][-1]['content']}\n")
        sys.stdout.flush()
        if self.engine:
            self.engine.generate(body["max_tokens"])
        while self.hangs.is_set():
            time.sleep(0.02)
        words = body.get("structured_outputs", {}).get("choice", [])
        texts = [f"from {os.getpid()}", *(f"from {os.getpid()}, again {i}" for i in range(1, body.get("n", 1)))]
        self.reply(200, {"choices": [verdict_choice(words)] if words else [text_choice(text) for text in texts]})

    def reply(self, status: int, value: object) -> None:
        self.send(status, "application/json", json.dumps(value).encode())

    def send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    action, *rest = next_action(Path(sys.argv[1]))
    sys.stdout.write(f"fake_vllm: starting {action}\n")
    sys.stdout.flush()
    if action == "crash":
        with Path(rest[0]).open() as log:
            shutil.copyfileobj(log, sys.stderr)
        sys.exit(1)
    if action == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    if os.fork() == 0:
        while True:
            time.sleep(60)
    if action == "silent":
        time.sleep(600)
    if action == "generate":
        Handler.engine = Engine(float(rest[0]))
    else:
        time.sleep(float(rest[0]) if rest else 0)
    signal.signal(signal.SIGUSR1, lambda *_: setattr(Handler, "health", 503))
    signal.signal(signal.SIGUSR2, lambda *_: Handler.hangs.clear() if Handler.hangs.is_set() else Handler.hangs.set())
    Handler.health = 503 if action == "unhealthy" else 200
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


main()

"""A process that behaves as vLLM does where that is awkward: deaf to SIGTERM, with a grandchild that is deaf too.

``python standin.py PLAN --port P ...``. PLAN is a file whose first line is taken at each start and says what happens:

    serve [S]      after S seconds answers /health and /v1; the grandchild outlives its parent
    crash LOG      prints the file LOG as vLLM would and exits with 1
    killed         dies by SIGKILL without a word
    silent         never listens
    sick           listens, and /health says 503; "serve" becomes so by SIGUSR1

By SIGUSR2 a "serve" is well by /health and answers no request any more, as where an engine hangs.
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


def take(plan: Path) -> list[str]:
    first, _, rest = plan.read_text().partition("\n")
    plan.write_text(rest or first)  # the last line stays
    return first.split(maxsplit=1)


class Handler(BaseHTTPRequestHandler):
    health = 200
    hangs = threading.Event()

    def do_GET(self) -> None:
        model = sys.argv[sys.argv.index("--served-model-name") + 1]
        body = {"data": [{"id": model, "owned_by": "vllm"}]} if self.path == "/v1/models" else {}
        allowed = self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"
        self.reply(self.health if self.path == "/health" else 200 if allowed else 401, body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.hangs.is_set():
            time.sleep(600)
        self.reply(200, {"choices": [{"message": {"content": f"from {os.getpid()}"}, "finish_reason": "stop"}]})

    def reply(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    what, *rest = take(Path(sys.argv[1]))
    sys.stdout.write(f"standin: starting {what}\n")
    sys.stdout.flush()
    if what == "crash":
        with Path(rest[0]).open() as log:
            shutil.copyfileobj(log, sys.stderr)
        sys.exit(1)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        while True:
            time.sleep(60)
    if what == "silent":
        time.sleep(600)
    time.sleep(float(rest[0]) if rest else 0)
    signal.signal(signal.SIGUSR1, lambda *_: setattr(Handler, "health", 503))
    signal.signal(signal.SIGUSR2, lambda *_: Handler.hangs.set())
    Handler.health = 503 if what == "sick" else 200
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


main()

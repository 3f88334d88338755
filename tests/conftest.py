"""Shared by tests: a scripted server, the command line as users call it, and one real vLLM for all of them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from tests.fake_server import Answer, ScriptedServer, echo

if TYPE_CHECKING:
    from tests.real import DemoServer

ROOT = Path(__file__).resolve().parent.parent

# Several workers, each with one thread per core: idle threads must not spin and slow the others down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts commands in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop if xdist would run the tests of one group in two workers, which would start two vLLMs and two runs."""
    if getattr(session.config.option, "loadgroup", False):
        ungrouped = [
            item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid
        ]
        if ungrouped:
            raise pytest.UsageError(f"xdist does not keep groups together with this pytest: {ungrouped[0]}")
    for item in session.items:
        group = item.get_closest_marker("xdist_group")
        if "demo_server" in getattr(item, "fixturenames", ()) and not (group and group.args == ("vllm",)):
            raise pytest.UsageError(f"{item.nodeid} uses the shared vLLM, but is not in its group")


@pytest.fixture(autouse=True)
def _isolated_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove keys and settings from the environment, so that tests do not depend on them."""
    for name in list(os.environ):
        if name.startswith("RLAIF_") and name != "RLAIF_CACHE":
            monkeypatch.delenv(name)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Start scripted servers: ``serve(answer, models=("m",), ...)``. All are stopped at the end of the test."""
    running: list[ScriptedServer] = []

    def start(answer: Answer = echo, **options: Any) -> ScriptedServer:
        server = ScriptedServer(answer, **options).__enter__()
        running.append(server)
        return server

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    """The only real vLLM with the demo model, started by the first test that sends a request."""
    from tests.real import DemoServer

    needs("vllm")
    server = DemoServer(tmp_path_factory.mktemp("log"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights in bfloat16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlaif.serving.demo_model import demo_checkpoint

    folder = tmp_path_factory.mktemp("model") / "small"
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def needs(*modules: str) -> None:
    """Skip the test if none of ``modules`` is installed. In CI, fail instead."""
    if not any(importlib.util.find_spec(name) for name in modules):
        skip_missing(" or ".join(modules))


def needs_tools(*modules: str) -> Path:
    """Return the Python of the environment for external tools. Like :func:`needs`, if one of ``modules`` is missing."""
    python = ROOT / ".venv" / "tools" / "bin" / "python"
    code = "import sys, importlib.util; sys.exit(None in map(importlib.util.find_spec, sys.argv[1:]))"
    if not python.exists() or subprocess.run([python, "-c", code, *modules], check=False).returncode:
        skip_missing(" or ".join(modules))
    return python


def needs_file(path: Path, name: str) -> Path:
    """Return ``path``. Like :func:`needs`, if it does not exist."""
    if not path.exists():
        skip_missing(name)
    return path


def skip_missing(name: str) -> NoReturn:
    """Skip the test that needs ``name``. In CI, fail instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed, but CI must run every test")
    pytest.skip(f"{name} is not installed: make setup brings it")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List each missing part with the number of tests that were skipped for it."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    missing = re.compile(r"Skipped: (.+) is not installed: make setup")
    parts = Counter(part for text in skipped for part in missing.findall(text))
    if parts:
        terminalreporter.section("missing parts")
    for part, n in sorted(parts.items()):
        terminalreporter.line(f"{part}: {n} test{'s' if n > 1 else ''} skipped; make setup brings it")


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of ``rlaif`` with ``arguments``."""
    return [sys.executable, "-m", "rlaif", *map(str, arguments)]


@pytest.fixture
def rlaif() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``rlaif("generate", run, ...)`` as a process, and check that its exit code is ``code`` (default 0)."""

    def call(*arguments: str | Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **options)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return call


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

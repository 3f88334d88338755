"""The managed server: it leaves nothing behind, its death has a reason, and it is restarted. Uses a fake vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif import cpu
from rlaif.config.models import ClientConfig
from rlaif.cpu import Core, Cores
from rlaif.errors import MissingDependencyError, RlaifError, ServerError, UsageError
from rlaif.llm.backends import ModelBackends
from rlaif.llm.client import Client
from rlaif.llm.usage import UsageMeter
from rlaif.serving import cores, demo_model, process_supervisor, vllm_server
from rlaif.serving.server_diagnosis import failure_reason
from rlaif.serving.vllm_server import Health, VllmServer, vllm_args
from tests.conftest import ROOT
from tests.processes import processes_carrying, wait_until

HERE = Path(__file__).parent
LOGS = HERE / "logs"
GRACE_S = 0.2
TWO_CORES = Cores((Core(0, 0), Core(1, 1)))
PROCESSOR = cpu.parse_cpuinfo((ROOT / "tests" / "cpuinfo" / "zen3.txt").read_text())


class FakeVllmServer(VllmServer):
    """A VllmServer that runs tests/serving/fake_vllm.py. ``plan`` holds the actions of its starts, in order."""

    plan: Path

    def _command(self, flags: list[str]) -> list[str]:
        real = super()._command(flags)
        return [real[0], str(HERE / "fake_vllm.py"), str(self.plan), *real[3:]]


def short_grace(folder: Path) -> str:
    """Write a copy of the supervisor with shorter grace periods, and return its path."""
    text = Path(process_supervisor.__file__).read_text()
    for line in ("\nSHUTDOWN_GRACE_S = 8.0\n", "\nCRASH_GRACE_S = 1.0\n"):
        assert line in text
        text = text.replace(line, f"{line.partition(' =')[0]} = {GRACE_S}\n")
    copy = folder / "process_supervisor.py"
    copy.write_text(text)
    return str(copy)


@pytest.fixture
def log_lines() -> list[str]:
    return []


Make = Callable[..., FakeVllmServer]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> Iterator[Make]:
    """Return ``make("serve", ...)``, which creates a server whose starts perform these actions in order.

    Ends all of its processes afterwards.
    """
    monkeypatch.setattr(process_supervisor, "__file__", short_grace(tmp_path))
    monkeypatch.setattr(vllm_server, "POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr(vllm_server, "LOG_FLUSH_S", 1.0)
    monkeypatch.setattr(vllm_server, "CORE_WAIT_S", 0.2)
    monkeypatch.setattr(vllm_server, "vllm_variant", lambda: "cpu")
    monkeypatch.setattr(cores, "default_lock_dir", lambda: tmp_path / "cores")  # a real vLLM may run at the same time
    monkeypatch.setattr(cpu, "usable_cores", lambda: TWO_CORES)
    monkeypatch.setattr(cpu, "detect_cpu", lambda: PROCESSOR)
    for name in (cores.BIND_VARIABLE, cores.SIM_NUMA_VARIABLE, *cpu.ISA_LIMITS):
        monkeypatch.delenv(name, raising=False)
    created: list[FakeVllmServer] = []

    def start(
        *plan: str,
        model: str = "some/model",
        options: dict[str, Any] | None = None,
        max_cores: int | None = None,
        **config: Any,
    ) -> FakeVllmServer:
        server = FakeVllmServer(
            model, options or {}, ClientConfig(**config), tmp_path / "log", log_lines.append, max_cores=max_cores
        )
        server.plan = tmp_path / f"plan{len(created)}"
        server.plan.write_text("\n".join(plan))
        created.append(server)
        return server

    yield start
    for server in created:
        for number in processes_carrying(server.key):
            os.kill(number, signal.SIGKILL)
        server.close()


def serving_processes(server: VllmServer) -> dict[int, str]:
    """Return the processes of the fake vLLM without the supervisor: the listening one and its grandchild."""
    return {
        n: command for n, command in processes_carrying(server.key).items() if "process_supervisor.py" not in command
    }


def supervisor_pid(server: VllmServer) -> int:
    assert server._process is not None
    return server._process.pid


def listening_pid(server: VllmServer) -> int:
    """Return the pid of the supervisor's child."""
    tasks = Path(f"/proc/{supervisor_pid(server)}/task/{supervisor_pid(server)}/children")
    (child,) = map(int, tasks.read_text().split())
    return child


# Cleanup


def test_a_server_on_a_cpu_compiles_no_kernels(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler does not quote the path of the environment: if it contained a space, every verdict failed."""
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    server = make("serve")
    server.start()
    environment = Path(f"/proc/{listening_pid(server)}/environ").read_bytes().split(b"\0")
    assert b"TORCH_COMPILE_DISABLE=1" in environment


def test_stop_ends_the_whole_group(make: Make, log_lines: list[str]) -> None:
    server = make("serve")
    server.start()
    assert server.is_running()
    assert len(serving_processes(server)) == 2
    server.stop()
    assert not processes_carrying(server.key)
    assert not server.is_running()
    server.stop()  # a second call does nothing
    assert log_lines[0].startswith(
        "starting vLLM with some/model: float32 (no avx512_bf16 or amx_bf16), cores 0-1 "
        "(usually takes about a minute on a CPU); log: "
    )
    assert log_lines[-1].startswith("vLLM is ready after ")


PARENT = f"""
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup makes children ignore it
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from rlaif import cpu
from rlaif.config.models import ClientConfig
from rlaif.serving import cores, process_supervisor, vllm_server
from tests.serving.test_vllm_server import TWO_CORES, FakeVllmServer
process_supervisor.__file__, vllm_server.POLL_INTERVAL_S, vllm_server.vllm_variant = sys.argv[2], 0.02, lambda: "cpu"
cores.default_lock_dir, cpu.usable_cores = lambda: Path(sys.argv[1]).parent / "cores", lambda: TWO_CORES
max_cores = int(sys.argv[3]) if len(sys.argv) > 3 else None
vllm_server.CORE_WAIT_S = float(sys.argv[4]) if len(sys.argv) > 4 else 0.2
log_lines = []
server = FakeVllmServer("some/model", {{}}, ClientConfig(), Path(sys.argv[1]).parent, log_lines.append, None, max_cores)
server.plan = Path(sys.argv[1])
server.start()
print(server.key, *log_lines[:1], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_no_process_is_left_however_the_parent_dies(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "plan").write_text("serve")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "plan"), short_grace(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    key = parent.stdout.readline().split()[0]
    parent.stdout.close()
    assert len(key) == 32
    assert len(processes_carrying(key)) == 3
    parent.send_signal(number)
    parent.wait(timeout=20)
    assert wait_until(lambda: not processes_carrying(key))


def test_a_fork_that_inherited_the_pipe_does_not_keep_the_server_alive(tmp_path: Path) -> None:
    """A fork of the parent keeps the pipe open, so the supervisor also checks if its parent is alive."""
    (tmp_path / "plan").write_text("serve")
    code = PARENT.replace("server.start()", "server.start(); import os; os.fork() or time.sleep(600)")
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "plan"), short_grace(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    key = parent.stdout.readline().split()[0]
    parent.stdout.close()
    assert len(processes_carrying(key)) == 3
    parent.kill()
    parent.wait(timeout=20)
    assert wait_until(lambda: not processes_carrying(key))
    os.killpg(parent.pid, signal.SIGKILL)


def test_the_group_ends_if_the_child_dies(make: Make) -> None:
    server = make("serve")
    server.start()
    os.kill(listening_pid(server), signal.SIGKILL)
    assert wait_until(lambda: not processes_carrying(server.key))
    assert wait_until(lambda: not server.is_running())  # the supervisor ends last
    assert server._failure_reason() == "error: the server was ended by signal 9 (Killed)"


def test_the_child_ends_if_the_supervisor_dies(make: Make) -> None:
    """After kill -9 of the supervisor, the kernel kills the child, and stop() ends the grandchild."""
    server = make("serve")
    server.start()
    child = listening_pid(server)
    os.kill(supervisor_pid(server), signal.SIGKILL)
    assert wait_until(lambda: child not in processes_carrying(server.key))
    assert not server.is_running()
    assert len(processes_carrying(server.key)) == 1
    server.stop()
    assert wait_until(lambda: not processes_carrying(server.key))


def test_the_server_restarts_after_the_supervisor_died(make: Make) -> None:
    server = make("serve")
    server.start()
    before = set(processes_carrying(server.key))
    os.kill(supervisor_pid(server), signal.SIGKILL)
    assert wait_until(lambda: not server.is_running())
    server.ensure_running()
    assert server.is_running()
    assert len(serving_processes(server)) == 2
    assert not before & set(processes_carrying(server.key))
    server.stop()
    assert wait_until(lambda: not processes_carrying(server.key))


def test_an_interrupt_during_the_start_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make("silent")
    monkeypatch.setattr("rlaif.llm.backends.VllmServer", lambda *_: server)
    threading.Thread(
        target=lambda: wait_until(lambda: len(serving_processes(server)) == 2) and os.kill(os.getpid(), signal.SIGINT)
    ).start()
    with pytest.raises(KeyboardInterrupt), ModelBackends(tmp_path, ClientConfig(), lambda line: None) as backends:
        backends.client_for("some/model", [], {}, UsageMeter())
    assert not processes_carrying(server.key)


def test_a_cancelled_start_ends(make: Make) -> None:
    """A second interrupt cancels the request whose thread restarts the server, and the thread must end too."""
    server, cancelled, failed = make("silent"), threading.Event(), list[BaseException]()

    def start() -> None:
        try:
            server.start(cancelled)
        except ServerError as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    assert wait_until(lambda: len(serving_processes(server)) == 2)
    cancelled.set()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "interrupted" in str(failed[0])
    assert not processes_carrying(server.key)


# Failed starts


@pytest.mark.parametrize(
    ("log", "expected", "hint"),
    [
        ("nomodel.log", "OSError: We couldn't connect to 'https://huggingface.co'", "Check the model's name"),
        ("nopath.log", "OSError: Repo id must be in the form 'repo_name'", "Check the model's name"),
        ("noargs.log", "error: unrecognized arguments: --no-such-thing", "Fix the settings in `[sampler.vllm]`"),
        ("typo.log", "error: unrecognized arguments: --tensor-paralel-size. Did you mean 'tensor_parallel_size'?", ""),
        ("toolong.log", "ValueError: User-specified max_model_len (99999) is greater", "Fix the settings"),
        ("kvsmall.log", "ValueError: To serve at least one request with the model's max seq len", "Lower"),
        ("oom.log", "ValueError: Available memory on node 0 (8.81/13.84 GiB) on kv cache allocation", "Lower"),
        ("died.log", "RuntimeError: CPU Generator does not use offset", "Read the log"),
        ("cuda.log", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", "Lower"),
    ],
)  # fmt: skip
def test_the_reason_is_the_root_cause_in_the_log(make: Make, log: str, expected: str, hint: str) -> None:
    """The logs are from real failed starts (vLLM 0.32; typo.log without most of the usage; cuda.log written by hand in
    the same form). Such starts are not retried."""
    server = make(f"crash {LOGS / log}", "serve")
    with pytest.raises(ServerError) as caught:
        server.start()
    assert caught.value.message.startswith(f"vLLM did not start: {expected}")
    assert caught.value.location == str(server.log_file)
    assert (caught.value.hint or "").startswith(hint)
    assert server.plan.read_text() == "serve"
    assert not processes_carrying(server.key)


def test_a_taken_port_is_retried_with_another(make: Make, log_lines: list[str]) -> None:
    server = make(f"crash {LOGS / 'port.log'}", f"crash {LOGS / 'port.log'}", "serve")
    server.start()
    assert server.is_running()
    assert sum("Address already in use); retrying" in line for line in log_lines) == 2


def test_a_server_is_given_up_after_three_failed_starts(make: Make, log_lines: list[str]) -> None:
    server = make("killed")
    with pytest.raises(
        ServerError, match=r"did not start: error: the server was ended by signal 9 \(Killed\)"
    ) as caught:
        server.start()
    assert sum(line.startswith("starting vLLM") for line in log_lines) == vllm_server.MAX_STARTS == 3
    assert "gpu_memory_utilization" in str(caught.value.hint)  # the kernel kills processes that use too much memory


def test_the_reason_is_from_the_last_start(make: Make) -> None:
    server = make(f"crash {LOGS / 'port.log'}", "crash /dev/null")
    with pytest.raises(ServerError, match="did not start: fake_vllm: starting crash"):
        server.start()
    assert "Address already in use" in server.log_file.read_text()


def test_a_server_that_does_not_become_healthy_is_ended(
    make: Make, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "LOG_INTERVAL_S", 0.1)
    for plan in ("silent", "unhealthy"):
        server = make(plan, server_start_timeout_s=0.6)
        with pytest.raises(ServerError, match="not healthy after 1 s"):
            server.start()
        assert not processes_carrying(server.key)
    assert sum(line.startswith("vLLM is loading some/model (") for line in log_lines) >= 4
    assert (
        sum(line.startswith("starting vLLM") for line in log_lines) == 2
    )  # not retried, as it would take as long again


def test_a_slow_start_is_logged_at_intervals(make: Make, log_lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "LOG_INTERVAL_S", 0.2)
    make("serve 1").start()
    assert 2 <= sum(line.startswith("vLLM is loading some/model (") for line in log_lines) <= 8
    assert log_lines[-1].startswith("vLLM is ready after ")


def test_a_missing_python_is_reported(make: Make) -> None:
    for name in ("/nowhere/bin/python", "no-such-python"):
        server = make("serve", server_python=name)
        with pytest.raises(MissingDependencyError, match=name) as caught:
            server.start()
        assert "server_python" in str(caught.value)


def test_another_python_runs_the_server_but_not_the_supervisor(make: Make, tmp_path: Path) -> None:
    """vLLM may have its own environment."""
    other = tmp_path / "other-python"
    other.symlink_to(sys.executable)
    server = make("serve", server_python=str(other))
    server.start()
    assert all(str(other) in command for command in serving_processes(server).values())
    assert processes_carrying(server.key)[supervisor_pid(server)].startswith(sys.executable)


def test_a_missing_vllm_is_a_missing_dependency(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        raise vllm_server.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vllm_server.importlib.metadata, "version", version)
    with pytest.raises(MissingDependencyError, match="vLLM is not installed") as caught:
        VllmServer("m", {}, ClientConfig(), tmp_path, print).start()
    assert caught.value.exit_code == 4


def test_logs_without_errors_have_a_reason_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert failure_reason(log) == "no log"
    log.write_text("")
    assert failure_reason(log) == "no output"
    log.write_text(
        "INFO starting\n(APIServer pid=1) WARNING 11-24 00:06:20 [a.py:1] such as `OSError: [Errno 24] x`\nlast\n\n"
    )
    assert failure_reason(log) == "last"
    log.write_bytes(b"\xff\xfeValueError: no\nValueError: " + b"x" * 10_000)
    assert failure_reason(log) == "ValueError: " + "x" * 288


# Restarts


def test_ensure_running_restarts_a_dead_server_once_for_all_callers(make: Make, log_lines: list[str]) -> None:
    server = make("serve")
    server.start()
    port, before = server.port, set(processes_carrying(server.key))
    server.ensure_running()
    assert set(processes_carrying(server.key)) == before  # it is alive, so nothing happens
    os.kill(listening_pid(server), signal.SIGKILL)
    callers = [threading.Thread(target=server.ensure_running) for _ in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert server.is_running()
    assert server.port == port
    assert len(processes_carrying(server.key)) == 3
    assert sum(line.startswith("vLLM has died (") for line in log_lines) == 1
    assert any("signal 9" in line for line in log_lines)


def test_a_server_is_dead_even_if_the_supervisor_has_not_noticed(make: Make) -> None:
    """No process listens any more, but the supervisor is still alive."""
    server = make("serve")
    server.start()
    os.kill(supervisor_pid(server), signal.SIGSTOP)
    child = listening_pid(server)
    os.kill(child, signal.SIGKILL)
    assert wait_until(lambda: child not in processes_carrying(server.key))
    assert server.is_running()
    threading.Timer(0.3, os.kill, (supervisor_pid(server), signal.SIGCONT)).start()
    server.ensure_running()
    assert len(serving_processes(server)) == 2


def test_a_server_whose_engine_is_dead_is_restarted(make: Make) -> None:
    """vLLM answers /health with 503 while it shuts down."""
    server = make("serve")
    server.start()
    before = set(serving_processes(server))
    os.kill(listening_pid(server), signal.SIGUSR1)
    assert wait_until(lambda: server.probe_health(2) is Health.DEAD)
    assert server.is_running()
    server.ensure_running()
    assert server.probe_health(2) is Health.HEALTHY
    assert len(serving_processes(server)) == 2
    assert not before & set(serving_processes(server))


def test_a_busy_server_is_not_dead(make: Make) -> None:
    """It accepts connections and does not answer in time."""
    server = make("serve")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        server.port = busy.getsockname()[1]
        assert server.probe_health(0.1) is Health.BUSY
    assert server.probe_health(0.1) is Health.DEAD


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGUSR2], ids=["process", "engine only"])
def test_a_hung_server_is_restarted_and_its_requests_are_answered(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], log_lines: list[str], number: int
) -> None:
    """It is alive and listens, but answers no requests."""
    server = make("serve")
    monkeypatch.setattr("rlaif.llm.backends.VllmServer", lambda *_: server)
    with ModelBackends(tmp_path, ClientConfig(max_attempts=4, timeout_s=1.0), lambda line: None) as backends:
        client = backends.client_for("some/model", [], {}, UsageMeter())

        async def main() -> set[str]:
            async with client:
                body = {"messages": [{"role": "user", "content": "?"}]}
                await client.chat(body)
                os.kill(listening_pid(server), number)
                replies = await asyncio.gather(*(client.chat(body) for _ in range(8)))
                return {reply.choices[0].text for reply in replies}

        assert len(asyncio.run(main())) == 1
        assert sum(line.startswith("vLLM hangs (the server does not answer)") for line in log_lines) == 1
    assert not processes_carrying(server.key)


def test_a_server_that_hangs_between_two_stages_is_restarted_for_the_next(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(vllm_server, "HEALTH_TIMEOUT_S", 0.2)
    server = make("serve")
    monkeypatch.setattr("rlaif.llm.backends.VllmServer", lambda *_: server)
    with ModelBackends(tmp_path, ClientConfig(), lambda line: None) as backends:
        backends.client_for("some/model", [], {}, UsageMeter())
        os.kill(listening_pid(server), signal.SIGSTOP)
        backends.client_for("some/model", [], {}, UsageMeter())
        assert server.probe_health(10) is Health.HEALTHY
    assert sum(line.startswith("vLLM hangs") for line in log_lines) == 1


def test_a_server_that_keeps_hanging_is_given_up_with_a_hint(make: Make) -> None:
    server = make("serve")
    server.start()
    for _ in range(vllm_server.MAX_STARTS):
        server.ensure_running(silent_since=time.monotonic())
    with pytest.raises(ServerError, match="more than 3 times: the server does not answer") as caught:
        server.ensure_running(silent_since=time.monotonic())
    assert "timeout_s" in str(caught.value.hint)


def test_a_server_that_keeps_dying_is_given_up(make: Make, log_lines: list[str]) -> None:
    server = make("serve")
    server.start()
    for _ in range(vllm_server.MAX_STARTS):
        os.kill(listening_pid(server), signal.SIGKILL)
        server.ensure_running()
    os.kill(listening_pid(server), signal.SIGKILL)
    with pytest.raises(ServerError, match="vLLM died more than 3 times: error: the server was ended by signal 9"):
        server.ensure_running()
    with pytest.raises(ServerError):
        server.ensure_running()
    assert sum(line.startswith("vLLM has died (") for line in log_lines) == 3
    assert not processes_carrying(server.key)


# Servers on a CPU


def environment_of(server: VllmServer) -> dict[str, str]:
    """Return the environment of the listening fake vLLM, as the kernel shows it."""
    text = Path(f"/proc/{listening_pid(server)}/environ").read_bytes().decode()
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def option(server: VllmServer, name: str) -> str | None:
    words = Path(f"/proc/{listening_pid(server)}/cmdline").read_bytes().decode().split("\0")
    return words[words.index(name) + 1] if name in words else None


def test_the_server_does_not_inherit_pythondontwritebytecode(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    server = make("serve")
    server.start()
    assert "PYTHONDONTWRITEBYTECODE" not in environment_of(server)
    assert environment_of(server)["SOMETHING_ELSE"] == "kept"


@pytest.mark.parametrize(
    ("options", "dtype", "expected"),
    [
        ({}, "float32", "float32 (no avx512_bf16 or amx_bf16)"),
        ({"dtype": "bfloat16"}, "bfloat16", "dtype bfloat16, as set"),
        ({"quantization": "awq"}, None, "quantized, in vLLM's own dtype"),
    ],
)
def test_the_dtype_depends_on_the_processor_and_the_options(
    make: Make, log_lines: list[str], options: dict[str, Any], dtype: str | None, expected: str
) -> None:
    server = make("serve", options=options)
    server.start()
    assert option(server, "--dtype") == dtype
    assert log_lines[0].startswith(f"starting vLLM with some/model: {expected}, cores 0-1 (")


def test_the_dtype_is_chosen_again_after_the_first_start_has_downloaded_the_model(
    make: Make, tmp_path: Path, log_lines: list[str]
) -> None:
    """Only the downloaded files show that the model is quantized, and vLLM rejects float32 for it."""
    model = tmp_path / "model"
    server = make(f"crash {LOGS / 'quantized.log'}", "serve", model=str(model))
    real, starts = server._spawn, list[list[str]]()

    def spawn(command: list[str], variables: Any) -> None:
        starts.append(command)
        real(command, variables)
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')

    server._spawn = spawn  # type: ignore[method-assign]
    server.start()
    assert ["--dtype" in command for command in starts] == [True, False]
    assert "float32 is not supported for quantization method awq" in log_lines[1]
    assert log_lines[2].startswith(f"starting vLLM with {model}: quantized, in vLLM's own dtype, cores 0-1 (")


def test_threads_are_bound_to_free_cores(make: Make, log_lines: list[str]) -> None:
    first, second, third = make("serve", max_cores=1), make("serve", max_cores=1), make("serve")
    for server in (first, second, third):
        server.start()
    assert [environment_of(server)[cores.BIND_VARIABLE] for server in (first, second, third)] == ["0", "1", "nobind"]
    assert environment_of(third)[cores.THREADS_VARIABLE] == "2"
    starting = [line for line in log_lines if line.startswith("starting")]
    assert "core 0 (usually takes" in starting[0]
    assert "not bound to cores, 2 threads (no core is free: other model servers hold 0-1) (usually takes" in starting[2]


def test_a_restarted_server_keeps_its_cores(make: Make) -> None:
    first, second = make("serve", max_cores=1), make("serve")
    first.start()
    first.stop()  # as before a restart
    second.start()
    assert environment_of(second)[cores.BIND_VARIABLE] == "1"
    first.ensure_running()
    assert environment_of(first)[cores.BIND_VARIABLE] == "0"
    first.close()
    third = make("serve")
    third.start()
    assert environment_of(third)[cores.BIND_VARIABLE] == "0"


def test_a_binding_set_by_the_user_is_kept(make: Make, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    monkeypatch.setenv(cores.BIND_VARIABLE, "0")
    server, other = make("serve"), make("serve")
    server.start()
    assert environment_of(server)[cores.BIND_VARIABLE] == "0"
    assert ", VLLM_CPU_OMP_THREADS_BIND=0, as set (usually takes" in log_lines[0]
    monkeypatch.setenv(cores.BIND_VARIABLE, "")
    other.start()
    assert environment_of(other)[cores.BIND_VARIABLE] == "0-1"  # no cores were claimed, and "" counts as unset


def test_servers_of_two_processes_use_different_cores(tmp_path: Path) -> None:
    """After kill -9 of one rlaif process, its core is free as soon as its server has ended."""
    (tmp_path / "plan").write_text("serve")

    def start(max_cores: int, wait_s: float = 0.2) -> tuple[subprocess.Popen[str], str, str]:
        line = [
            sys.executable,
            "-c",
            PARENT,
            str(tmp_path / "plan"),
            short_grace(tmp_path),
            str(max_cores),
            str(wait_s),
        ]
        parent = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert parent.stdout is not None
        key = parent.stdout.readline().split()[0]
        parent.stdout.close()
        (bound,) = {
            variable.removeprefix(f"{cores.BIND_VARIABLE}=")
            for number in processes_carrying(key)
            for variable in Path(f"/proc/{number}/environ").read_bytes().decode().split("\0")
            if variable.startswith(f"{cores.BIND_VARIABLE}=")
        } - {os.environ.get(cores.BIND_VARIABLE)}
        return parent, key, bound

    parents = []
    try:
        (first, first_key, bound), (second, _, other), (third, _, none) = [start(1) for _ in range(3)]
        parents += [first, second, third]
        assert (bound, other, none) == ("0", "1", "nobind")
        assert processes_carrying(first_key)
        first.kill()  # then the same command at once, while the supervisor is still ending the server
        parents.append((again := start(2, 30.0))[0])
        assert again[2] == "0"
    finally:
        for parent in parents:
            parent.kill()
            parent.wait(timeout=20)
    assert wait_until(lambda: not processes_carrying(str(tmp_path / "plan")))


# Backends and the client


def test_requests_are_answered_after_a_restart(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    server = make("serve")
    monkeypatch.setattr("rlaif.llm.backends.VllmServer", lambda *_: server)
    with ModelBackends(tmp_path, ClientConfig(max_attempts=4), lambda line: None) as backends:
        client = backends.client_for("some/model", [], {}, UsageMeter())

        async def main() -> list[str]:
            async with client:
                assert await client.check() == "vllm"
                body = {"messages": [{"role": "user", "content": "?"}]}
                first = await client.chat(body)
                os.kill(listening_pid(server), signal.SIGKILL)
                replies = await asyncio.gather(*(client.chat(body) for _ in range(8)))
                return [reply.choices[0].text for reply in (first, *replies)]

        texts = asyncio.run(main())
        assert len(set(texts[1:])) == 1
        assert texts[0] != texts[1]
    assert not processes_carrying(server.key)


def test_a_server_restarts_on_another_port_if_its_port_is_taken(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    server = make("serve")
    monkeypatch.setattr("rlaif.llm.backends.VllmServer", lambda *_: server)

    def close_connections(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    with contextlib.ExitStack() as stack:
        backends = stack.enter_context(ModelBackends(tmp_path, ClientConfig(max_attempts=6), lambda line: None))
        client = backends.client_for("some/model", [], {}, UsageMeter())
        port, body = server.port, {"messages": [{"role": "user", "content": "?"}]}

        async def main() -> list[str]:
            async with client:
                first = await client.chat(body)
                os.kill(listening_pid(server), signal.SIGKILL)
                assert wait_until(lambda: server.probe_health(1) is Health.DEAD)
                listener = stack.enter_context(socket.create_server(("127.0.0.1", port)))
                stack.callback(listener.shutdown, socket.SHUT_RDWR)
                threading.Thread(target=close_connections, args=(listener,), daemon=True).start()
                replies = await asyncio.gather(*(client.chat(body) for _ in range(4)))
                return [reply.choices[0].text for reply in (first, *replies)]

        texts = asyncio.run(main())
        assert server.port != port
        assert len(set(texts[1:])) == 1
        assert texts[0] != texts[1]


def test_a_server_that_died_between_two_stages_is_restarted_for_the_next(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make("serve")
    monkeypatch.setattr("rlaif.llm.backends.VllmServer", lambda *_: server)
    with ModelBackends(tmp_path, ClientConfig(), lambda line: None) as backends:
        backends.client_for("some/model", [], {}, UsageMeter())
        os.kill(listening_pid(server), signal.SIGKILL)
        assert wait_until(lambda: not server.is_running())
        client = backends.client_for("some/model", [], {}, UsageMeter())
        assert server.is_running()
        assert client.url == server.url
    assert not server.is_running()


def test_one_server_runs_at_a_time_and_is_reused_for_its_model(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[FakeVllmServer] = []

    def new(model: str, *_: Any) -> FakeVllmServer:
        assert not any(server.is_running() for server in created)
        created.append(make("serve", model=model))
        return created[-1]

    monkeypatch.setattr("rlaif.llm.backends.VllmServer", new)
    with ModelBackends(tmp_path, ClientConfig(), lambda line: None) as backends:
        for model in ("a", "a", "b", "a"):
            assert isinstance(backends.client_for(model, [], {}, UsageMeter()), Client)
            assert [server.model for server in created if server.is_running()] == [model]
    assert [server.model for server in created] == ["a", "b", "a"]
    assert not any(processes_carrying(server.key) for server in created)


def test_a_url_starts_no_server_and_allows_no_vllm_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.llm.backends.VllmServer", None)
    with ModelBackends(tmp_path, ClientConfig(), lambda line: None) as backends:
        assert backends.client_for("m", ["http://127.0.0.1:9/v1"], {}, UsageMeter()).urls == ["http://127.0.0.1:9/v1"]
        with pytest.raises(UsageError, match="`base_url` is set"):
            backends.client_for("m", ["http://127.0.0.1:9/v1"], {"max_model_len": 1}, UsageMeter())


# Command line


def test_the_key_is_in_the_environment_and_in_no_command_line_or_log(make: Make) -> None:
    server = make("serve")
    server.start()
    commands = processes_carrying(server.key)
    assert len(commands) == 3
    assert not any(server.key in command for command in commands.values())
    server.stop()
    assert server.key not in server.log_file.read_text()
    assert server.key not in repr(server)


def test_health_checks_bypass_proxies(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    make("serve", server_start_timeout_s=20).start()


def flags_of(kind: str, options: dict[str, Any]) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    for word in vllm_args("some/model", kind, options):
        if word.startswith("--"):
            assert word not in flags
            flags[word] = []
            last = word
        else:
            flags[last].append(word)
    return flags


def test_vllm_settings_become_flags() -> None:
    flags = flags_of(
        "cuda",
        {
            "max_model_len": 512,
            "enable_prefix_caching": False,
            "lora_modules": ["a=b", "c=d"],
            "hf_overrides": {"x": [1, True]},
            "generation-config": "auto",
        },
    )
    assert flags["--model"] == ["some/model"]
    assert flags["--served-model-name"] == ["some/model"]
    assert flags["--host"] == ["127.0.0.1"]
    assert flags["--max-model-len"] == ["512"]
    assert flags["--no-enable-prefix-caching"] == []
    assert flags["--lora-modules"] == ["a=b", "c=d"]
    assert flags["--hf-overrides"] == ['{"x": [1, true]}']
    assert flags["--generation-config"] == ["auto"]  # either spelling works, and the flag occurs once
    assert "--enforce-eager" not in flags


def test_on_a_cpu_prompts_are_not_prefilled_in_chunks() -> None:
    """Otherwise a request with a seed would kill the engine, so no chunk is shorter than the longest prompt."""
    for options in ({}, {"max_model_len": 8192}, {"max-model-len": 8192}):
        flags = flags_of("cpu", options)
        assert flags["--max-num-batched-tokens"] == flags["--max-model-len"]
        assert "--no-enable-chunked-prefill" in flags
        assert "--enforce-eager" in flags
    assert flags["--max-model-len"] == ["8192"]


@pytest.mark.parametrize("name", ["host", "port", "api_key", "api-key", "model", "served_model_name"])
def test_reserved_options_are_rejected(name: str) -> None:
    with pytest.raises(UsageError, match="reserved"):
        vllm_args("some/model", "cpu", {name: "x"})


def test_log_names_are_short_and_inside_the_folder(tmp_path: Path) -> None:
    for model in ("org/model-7B", "/a/../../b", "..", "x" * 300, "a b\n"):
        log = VllmServer(model, {}, ClientConfig(), tmp_path, print).log_file
        assert log.parent == tmp_path
        assert len(log.name) < 80


def test_the_embedded_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command waits while another one converts it, then uses the result."""
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    converted: list[Path] = []

    def convert(_gguf: Path, target: Path) -> None:
        time.sleep(0.2)
        converted.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_convert", convert)
    monkeypatch.setattr(demo_model, "_find_gguf", lambda: tmp_path)
    threads = [threading.Thread(target=demo_model.demo_checkpoint) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert converted == [tmp_path / demo_model.CHECKPOINT_DIR_NAME]
    assert demo_model.resolve_model("demo") == str(tmp_path / demo_model.CHECKPOINT_DIR_NAME)
    assert demo_model.resolve_model("org/model") == "org/model"


def test_a_missing_embedded_model_is_a_missing_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "WEIGHTS_PACKAGE", "no_such_package_here")
    with pytest.raises(MissingDependencyError, match="the embedded model is not installed") as caught:
        demo_model.resolve_model("demo")
    assert isinstance(caught.value, RlaifError)

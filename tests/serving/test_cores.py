"""Claims of cores: no two servers share a core, and files of other users in the shared folder do no harm."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from rlaif.config.models import ClientConfig, ClusterConfig
from rlaif.cpu import Core, Cores
from rlaif.serving import cores, ray_replica
from rlaif.serving.cores import (
    BIND_VARIABLE,
    SIM_NUMA_VARIABLE,
    THREADS_VARIABLE,
    CoreClaim,
    binding_variables,
    claim_cores,
    describe_binding,
    format_cpu_list,
    user_binding,
)
from rlaif.serving.vllm_server import VllmServer


def machine(count: int, *, nodes: int = 1, quota: float | None = None) -> Cores:
    return Cores(tuple(Core(n, n, n * nodes // count) for n in range(count)), quota)


def cpus(claimed: CoreClaim) -> list[int]:
    return [core.cpu for core in claimed.cores]


def test_a_claim_takes_free_cores_and_releases_them(tmp_path: Path) -> None:
    lock_dir = tmp_path / "cores"
    first = claim_cores(machine(3), 2, lock_dir=lock_dir)
    second = claim_cores(machine(3), lock_dir=lock_dir)
    none = claim_cores(machine(3), lock_dir=lock_dir)
    assert (cpus(first), cpus(second), cpus(none)) == ([0, 1], [2], [])
    assert none.reason == "no core is free: other model servers hold 0-2"
    first.release()
    assert cpus(claim_cores(machine(3), lock_dir=lock_dir)) == [0, 1]
    second.release()
    second.release()  # a second call does nothing


def test_a_child_that_inherits_the_files_keeps_the_cores_until_it_dies(tmp_path: Path) -> None:
    held = claim_cores(machine(2), lock_dir=tmp_path / "cores")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=held.lock_fds)
    held.release()
    assert not claim_cores(machine(2), lock_dir=tmp_path / "cores").cores
    child.kill()
    child.wait()
    assert cpus(claim_cores(machine(2), lock_dir=tmp_path / "cores")) == [0, 1]


def test_a_claim_waits_for_a_core_that_becomes_free(tmp_path: Path) -> None:
    lock_dir = tmp_path / "cores"
    held = claim_cores(machine(2), lock_dir=lock_dir)
    threading.Timer(0.3, held.release).start()
    assert cpus(claim_cores(machine(2), lock_dir=lock_dir, timeout_s=30.0)) == [0, 1]


def test_processes_that_claim_at_once_share_without_overlap(tmp_path: Path) -> None:
    """Each of eight processes gets two of sixteen cores."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom rlaif.cpu import Core, Cores\n"
        "from rlaif.serving.cores import claim_cores\n"
        "sys.stdin.readline()\n"
        "held = claim_cores(Cores(tuple(Core(n, n) for n in range(17))), 2, lock_dir=Path(sys.argv[1]))\n"
        "print(*[core.cpu for core in held.cores], flush=True)\nsys.stdin.readline()\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "cores")]
    running = [subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    for process in running:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    cpu_lists = [process.stdout.readline().split() for process in running if process.stdout]
    for process in running:
        process.communicate("end\n", timeout=60)
    assert [len(numbers) for numbers in cpu_lists] == [2] * 8
    assert len({number for numbers in cpu_lists for number in numbers}) == 16


def test_one_worker_stays_on_one_numa_node(tmp_path: Path) -> None:
    usable = machine(8, nodes=2)  # the last core stays free
    assert cpus(claim_cores(usable, lock_dir=tmp_path / "a")) == [0, 1, 2, 3]
    held = claim_cores(usable, 3, lock_dir=tmp_path / "b")
    assert cpus(claim_cores(usable, lock_dir=tmp_path / "b")) == [4, 5, 6]  # this node has more free cores
    held.release()
    assert cpus(claim_cores(usable, max_nodes=2, lock_dir=tmp_path / "c")) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("count", "nodes", "ranks", "bound"),
    [(1, 1, 1, "0"), (2, 1, 1, "0-1"), (2, 1, 2, "0|1"), (3, 1, 2, "0|1"), (8, 1, 2, "0-2|3-5"),
     (9, 1, 4, "0-1|2-3|4-5|6-7"), (8, 2, 2, "0-2|4-6"), (16, 2, 4, "0-2|3-5|8-10|11-13"), (9, 2, 3, "0-1|2-3|4-5")],
)  # fmt: skip
def test_cores_are_split_evenly_over_workers(tmp_path: Path, count: int, nodes: int, ranks: int, bound: str) -> None:
    usable = machine(count, nodes=nodes)
    held = claim_cores(usable, max_nodes=ranks, lock_dir=tmp_path / "cores")
    assert binding_variables(held, usable, ranks) == {BIND_VARIABLE: bound}
    assert describe_binding(held, usable, ranks) == f"core{'' if bound == '0' else 's'} {bound}"


def test_vllm_parses_the_binding() -> None:
    pytest.importorskip("vllm")
    from vllm.utils.cpu_resource_utils import parse_id_list

    for numbers in ([0], [0, 1], [0, 1, 2, 8], [3, 5, 6]):
        assert parse_id_list(format_cpu_list(numbers)) == numbers


def test_too_few_cores_for_the_workers_are_not_bound() -> None:
    held, usable = CoreClaim((Core(0, 0),)), machine(1)
    assert binding_variables(held, usable, 2) == {BIND_VARIABLE: "nobind", THREADS_VARIABLE: "1"}
    assert describe_binding(held, usable, 2) == "not bound to cores, 1 thread each (1 free for 2 workers)"


def test_under_a_quota_threads_are_counted_but_not_bound(tmp_path: Path) -> None:
    """All containers of a machine see the same core numbers. Bound to the first ones, they would share those."""
    usable = machine(64, quota=4.0)
    held = claim_cores(usable, lock_dir=tmp_path / "cores")
    assert binding_variables(held, usable) == {BIND_VARIABLE: "nobind", THREADS_VARIABLE: "3"}
    assert describe_binding(held, usable) == "3 threads (CPU quota 4)"
    assert binding_variables(claim_cores(usable, lock_dir=tmp_path / "cores"), usable) == {
        BIND_VARIABLE: "nobind",
        THREADS_VARIABLE: "4",
    }


def test_a_binding_set_by_the_user_is_detected() -> None:
    assert user_binding({}) is None
    assert user_binding({BIND_VARIABLE: "", SIM_NUMA_VARIABLE: "0"}) is None
    assert user_binding({BIND_VARIABLE: "0"}) == f"{BIND_VARIABLE}=0"
    assert user_binding({SIM_NUMA_VARIABLE: "1"}) == f"{SIM_NUMA_VARIABLE}=1"


# The shared folder


def test_the_folder_is_shared_and_its_files_are_read_only(tmp_path: Path) -> None:
    lock_dir = tmp_path / "cores"
    before = os.umask(0o077)
    try:
        held = claim_cores(machine(1), lock_dir=lock_dir)
    finally:
        os.umask(before)
    assert stat.S_IMODE(lock_dir.stat().st_mode) == 0o1777
    assert {stat.S_IMODE(file.stat().st_mode) for file in lock_dir.iterdir()} == {0o444}
    held.release()


def test_links_and_other_traps_are_not_followed_and_not_changed(tmp_path: Path) -> None:
    lock_dir, victim = tmp_path / "cores", tmp_path / "victim"
    lock_dir.mkdir()
    victim.write_text("kept")
    victim.chmod(0o600)
    (lock_dir / "core-0").symlink_to(victim)
    (lock_dir / "core-1").hardlink_to(victim)
    os.mkfifo(lock_dir / "core-2")
    (lock_dir / "turn").symlink_to(tmp_path / "nowhere")
    held = claim_cores(machine(3), lock_dir=lock_dir)
    assert cpus(held) == [1]  # the lock is on a hard link; the file is not read, written or changed
    assert (victim.read_text(), stat.S_IMODE(victim.stat().st_mode)) == ("kept", 0o600)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_used_leaves_the_server_unbound(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name, reason in (("link", "Not a directory"), ("file", "Not a directory"), ("no/where", "No such file")):
        held = claim_cores(machine(2), lock_dir=tmp_path / name)
        assert not held.cores
        assert held.reason.startswith(f"cores cannot be reserved in {tmp_path / name}: {reason}")
        assert binding_variables(held, machine(2)) == {BIND_VARIABLE: "nobind", THREADS_VARIABLE: "2"}
    assert not list((tmp_path / "real").iterdir())


def test_the_folder_does_not_depend_on_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cores.default_lock_dir()
    monkeypatch.setenv("TMPDIR", "/somewhere/of/mine")
    assert cores.default_lock_dir() == before


# On Ray


class FakeServe(types.ModuleType):
    """A fake of the parts of Ray Serve that deploy and create a replica. Keeps the arguments of the deployment."""

    def __init__(self) -> None:
        super().__init__("ray.serve")
        self.bound: list[Any] = []

    def deployment(self, _replica: type) -> FakeServe:
        return self

    def options(self, **_: Any) -> FakeServe:
        return self

    def bind(self, *arguments: Any, **_: Any) -> None:
        self.bound += arguments

    def get_replica_context(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(app_name="app", replica_id=types.SimpleNamespace(unique_id="r1"))


@pytest.mark.parametrize(("cpus", "max_cores"), [(0.5, 1), (1, 1), (3.9, 3), (8, 8)])
def test_a_replica_uses_the_cores_that_ray_counts_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: float, max_cores: int
) -> None:
    started: list[VllmServer] = []

    class WaitingServer(VllmServer):
        def start(self, cancelled: threading.Event | None = None) -> None:
            started.append(self)

        def wait(self) -> None:
            threading.Event().wait()  # a replica whose server has ended ends its process

    serve = FakeServe()
    ray = types.ModuleType("ray")
    ray.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setattr(ray_replica, "VllmServer", WaitingServer)
    ray_replica.build_application(ray_replica.ServedModel("some/model"), ClusterConfig(cpus=cpus), ClientConfig(), 0)
    ray_replica.VllmReplica(*serve.bound, log_dir=str(tmp_path))
    assert [server._max_cores for server in started] == [max_cores]

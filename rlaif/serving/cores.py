"""Claims of CPU cores for model servers, so that two servers on one machine never share a core.

Each physical core has a small file in a folder that all users of the machine share. The process that holds its
``flock`` owns the core. The server's supervisor inherits the open files, so the kernel drops the locks when the last of
these processes ends, however it ends. Containers that do not share /dev/shm do not see each other's locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlaif.cpu import Core, Cores

BIND_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
SIM_NUMA_VARIABLE = "VLLM_CPU_SIM_MULTI_NUMA"
"""If this variable is set, vLLM binds its threads itself and rejects :data:`BIND_VARIABLE`."""
THREADS_VARIABLE = "OMP_NUM_THREADS"
LOCK_DIR_NAME = "rlaif-cores"
POLL_INTERVAL_S = 0.1
CLAIM_LOCK_TIMEOUT_S = 5.0
"""How long to wait for another process to claim its cores, which takes milliseconds."""


@dataclass
class CoreClaim:
    """Cores that no other server uses while ``lock_fds`` are open here or in a process that inherited them."""

    cores: tuple[Core, ...] = ()
    reason: str = ""
    """Reason for an empty claim."""
    all_in_use: bool = False
    """True if other servers use all cores, so that a later claim may succeed."""
    lock_fds: list[int] = field(default_factory=list)

    def release(self) -> None:
        """Close the lock files. A process that inherited them keeps the cores."""
        while self.lock_fds:
            os.close(self.lock_fds.pop())


def default_lock_dir() -> Path:
    """Return the folder of the lock files, which is the same for all users of the machine, whatever their TMPDIR."""
    shared = Path("/dev/shm")  # noqa: S108  opened and checked below
    return (shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())) / LOCK_DIR_NAME


def claim_cores(
    usable: Cores,
    max_cores: int | None = None,
    max_nodes: int = 1,
    *,
    lock_dir: Path | None = None,
    timeout_s: float = 0.0,
) -> CoreClaim:
    """Claim the free cores of up to ``max_nodes`` NUMA nodes, at most ``max_cores``.

    One worker on two nodes would read half of its memory from the other node. If no core is free, try again for
    ``timeout_s``: the supervisor of a run that was just killed needs a moment to end its server.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        result = _try_claim(usable, max_cores, max_nodes, lock_dir)
        if not result.all_in_use or time.monotonic() >= deadline:
            return result
        time.sleep(POLL_INTERVAL_S)


def _try_claim(usable: Cores, max_cores: int | None, max_nodes: int, lock_dir: Path | None) -> CoreClaim:
    candidates, lock_dir = usable.for_servers, lock_dir or default_lock_dir()
    try:
        directory_fd = _open_lock_dir(lock_dir)
    except OSError as error:
        return CoreClaim(reason=f"cores cannot be reserved in {lock_dir}: {error.strerror}")
    held: dict[Core, int] = {}
    problem = ""
    try:
        with _claim_mutex(directory_fd):
            for core in candidates:
                try:
                    held[core] = _open_locked(directory_fd, f"core-{core.id}")
                except BlockingIOError:
                    continue
                except OSError as error:
                    problem = f"cores cannot be reserved in {lock_dir}: {error.strerror}"
            nodes_of_cores = [core.node for core in held]
            chosen_nodes = sorted(dict.fromkeys(nodes_of_cores), key=nodes_of_cores.count, reverse=True)[:max_nodes]
            chosen = [core for core in held if core.node in chosen_nodes][:max_cores]
            for core in set(held) - set(chosen):
                os.close(held[core])
    finally:
        os.close(directory_fd)
    if problem and not chosen:
        return CoreClaim(reason=problem)
    if not chosen:
        cpu_list = format_cpu_list([core.cpu for core in candidates])
        return CoreClaim(reason=f"no core is free: other model servers hold {cpu_list}", all_in_use=True)
    return CoreClaim(tuple(chosen), lock_fds=[held[core] for core in chosen])


def binding_variables(core_claim: CoreClaim, usable: Cores, num_workers: int = 1) -> dict[str, str]:
    """Return the environment variables that bind a vLLM of ``num_workers`` workers to the claimed cores, split evenly.

    Under a CPU quota the number of threads is set, but they are not bound: other containers on the machine see the same
    core numbers.
    """
    groups = _split_cores(core_claim.cores, num_workers)
    if not groups or usable.quota_limited:
        return {
            BIND_VARIABLE: "nobind",
            THREADS_VARIABLE: str(max(1, (len(core_claim.cores) or usable.count) // num_workers)),
        }
    return {BIND_VARIABLE: "|".join(format_cpu_list([core.cpu for core in group]) for group in groups)}


def _split_cores(cores: Sequence[Core], num_workers: int) -> list[Sequence[Core]]:
    """Return ``num_workers`` groups of equal size, each within one NUMA node if the nodes divide evenly.

    Returns [] if there are fewer cores than workers.
    """
    by_node = [[core for core in cores if core.node == node] for node in dict.fromkeys(core.node for core in cores)]
    parts = by_node if by_node and num_workers % len(by_node) == 0 else [list(cores)]
    groups_per_part = num_workers // len(parts)
    size = min(len(part) // groups_per_part for part in parts)
    return [part[n * size : (n + 1) * size] for part in parts for n in range(groups_per_part)] if size else []


def user_binding(environ: Mapping[str, str]) -> str | None:
    """Return the setting ("NAME=value") with which the user binds vLLM's threads, or None."""
    for name, unset_values in ((BIND_VARIABLE, ("",)), (SIM_NUMA_VARIABLE, ("", "0"))):
        if environ.get(name, "") not in unset_values:
            return f"{name}={environ[name]}"
    return None


def describe_binding(core_claim: CoreClaim, usable: Cores, num_workers: int = 1) -> str:
    """Describe the result of :func:`binding_variables` for log lines."""
    variables = binding_variables(core_claim, usable, num_workers)
    if variables[BIND_VARIABLE] != "nobind":
        return f"cores {variables[BIND_VARIABLE]}" if len(core_claim.cores) > 1 else f"core {variables[BIND_VARIABLE]}"
    count = int(variables[THREADS_VARIABLE])
    threads = f"{count} thread{'' if count == 1 else 's'}"
    if core_claim.reason:
        return f"not bound to cores, {threads} ({core_claim.reason})"
    if usable.quota_limited:
        return f"{threads} (CPU quota {usable.quota:g})"
    return f"not bound to cores, {threads} each ({len(core_claim.cores)} free for {num_workers} workers)"


def format_cpu_list(cpus: Sequence[int]) -> str:
    """Return CPU numbers in the kernel's notation: ``0-2,8``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _open_lock_dir(lock_dir: Path) -> int:
    """Open the folder and create it if it is missing. Links are rejected: another user may have created one."""
    created = False
    with contextlib.suppress(FileExistsError):
        lock_dir.mkdir()
        created = True
    directory_fd = os.open(lock_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if created:
        os.fchmod(directory_fd, 0o1777)  # the umask has reduced mkdir's mode
    return directory_fd


def _open_locked(directory_fd: int, name: str) -> int:
    """Return the file descriptor of the locked file. Raises OSError if another process holds the lock.

    A file is opened read-only, and its mode is changed only if it was created here: in a world-writable folder, a name
    may be a link to anything.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=directory_fd)
        os.fchmod(fd, 0o444)
    except FileExistsError:
        fd = os.open(name, flags, dir_fd=directory_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", name)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _claim_mutex(directory_fd: int) -> Iterator[None]:
    """Let one process claim at a time. Otherwise two processes that start together could get half of the cores each."""
    fd, deadline = None, time.monotonic() + CLAIM_LOCK_TIMEOUT_S
    while fd is None and time.monotonic() < deadline:
        try:
            fd = _open_locked(directory_fd, "turn")
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)

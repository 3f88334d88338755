"""Which cores a model server computes on, so that two servers on one machine never share one.

Each physical core has a small file in a folder that all users of the machine share. Whoever holds its ``flock`` has the
core. The files are handed to the server's guard, so the kernel drops the locks when the last of them ends, however it
ends. Containers that do not share /dev/shm do not see each other's locks.
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

BIND = "VLLM_CPU_OMP_THREADS_BIND"
SIMULATED = "VLLM_CPU_SIM_MULTI_NUMA"
"""With this one vLLM binds by itself, and refuses :data:`BIND`."""
THREADS = "OMP_NUM_THREADS"
NAME = "rlaif-cores"
NONE_FREE = "no core is free"
LOOK_EVERY_S = 0.1
TURN_S = 5.0
"""How long to wait while another process claims its cores, which takes milliseconds."""


@dataclass
class Claim:
    """Cores that nobody else's server uses while ``files`` are open here or in a process that inherited them.

    ``cores`` may be empty: then ``why`` says why there are none.
    """

    cores: tuple[Core, ...] = ()
    why: str = ""
    files: list[int] = field(default_factory=list)

    def release(self) -> None:
        """Close the files. A process that inherited them keeps the cores."""
        while self.files:
            os.close(self.files.pop())


def folder() -> Path:
    """Return the folder of the locks: the same one for every user of the machine, whatever their TMPDIR."""
    shared = Path("/dev/shm")  # noqa: S108  opened and checked below
    return (shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())) / NAME


def claim(
    usable: Cores, most: int | None = None, nodes: int = 1, *, where: Path | None = None, patience_s: float = 0.0
) -> Claim:
    """Claim free cores of ``nodes`` NUMA nodes: all there are, or ``most``.

    One worker on two nodes would read half of its memory from the other one. If no core is free, look again for
    ``patience_s``: the guard of a run that was just killed needs a moment to end its server.
    """
    until = time.monotonic() + patience_s
    while True:
        claimed = _claim(usable, most, nodes, where)
        if claimed.cores or not claimed.why.startswith(NONE_FREE) or time.monotonic() >= until:
            return claimed
        time.sleep(LOOK_EVERY_S)


def _claim(usable: Cores, most: int | None, nodes: int, where: Path | None) -> Claim:
    wanted, where = usable.for_servers, where or folder()
    try:
        directory = _open_folder(where)
    except OSError as error:
        return Claim(why=f"cores cannot be reserved in {where}: {error.strerror}")
    held: dict[Core, int] = {}
    problem = ""
    try:
        with _turn(directory):
            for core in wanted:
                try:
                    held[core] = _lock(directory, f"core-{core.id}")
                except BlockingIOError:
                    continue
                except OSError as error:
                    problem = f"cores cannot be reserved in {where}: {error.strerror}"
            used = [core.node for core in held]
            best = sorted(dict.fromkeys(used), key=used.count, reverse=True)[:nodes]
            kept = [core for core in held if core.node in best][:most]
            for core in set(held) - set(kept):
                os.close(held[core])
    finally:
        os.close(directory)
    if not kept:
        taken = f"{NONE_FREE}: other model servers hold {shown([core.cpu for core in wanted])}"
        return Claim(why=problem or taken)
    return Claim(tuple(kept), files=[held[core] for core in kept])


def binding(claimed: Claim, usable: Cores, ranks: int = 1) -> dict[str, str]:
    """Return the variables that have a vLLM of ``ranks`` workers compute on the claimed cores, split evenly.

    Under a CPU quota threads are counted but not bound: other containers on the machine choose the same core numbers.
    """
    groups = _groups(claimed.cores, ranks)
    if not groups or usable.rationed:
        return {BIND: "nobind", THREADS: str(max(1, (len(claimed.cores) or usable.count) // ranks))}
    return {BIND: "|".join(shown([core.cpu for core in group]) for group in groups)}


def _groups(cores: Sequence[Core], ranks: int) -> list[Sequence[Core]]:
    """Return ``ranks`` groups of equal size, each within one NUMA node if the nodes divide evenly; [] if too few."""
    by_node = [[core for core in cores if core.node == node] for node in dict.fromkeys(core.node for core in cores)]
    parts = by_node if by_node and ranks % len(by_node) == 0 else [list(cores)]
    of_each = ranks // len(parts)
    size = min(len(part) // of_each for part in parts)
    return [part[n * size : (n + 1) * size] for part in parts for n in range(of_each)] if size else []


def set_by(environ: Mapping[str, str]) -> str | None:
    """Return the variable with its value by which a user binds vLLM's threads, or None."""
    for name, off in ((BIND, ("",)), (SIMULATED, ("", "0"))):
        if environ.get(name, "") not in off:
            return f"{name}={environ[name]}"
    return None


def described(claimed: Claim, usable: Cores, ranks: int = 1) -> str:
    """Return what :func:`binding` does in words, for the line that announces a start."""
    variables = binding(claimed, usable, ranks)
    if variables[BIND] != "nobind":
        return f"cores {variables[BIND]}" if len(claimed.cores) > 1 else f"core {variables[BIND]}"
    count = int(variables[THREADS])
    threads = f"{count} thread{'' if count == 1 else 's'}"
    if claimed.why:
        return f"not bound to cores, {threads} ({claimed.why})"
    if usable.rationed:
        return f"{threads} (CPU quota {usable.quota:g})"
    return f"not bound to cores, {threads} each ({len(claimed.cores)} free for {ranks} workers)"


def shown(cpus: Sequence[int]) -> str:
    """Return CPU numbers in the kernel's notation: ``0-2,8``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _open_folder(where: Path) -> int:
    """Open the folder, made if it is not there. Links are refused: another user may have put one in its place."""
    made = False
    with contextlib.suppress(FileExistsError):
        where.mkdir()
        made = True
    directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if made:
        os.fchmod(directory, 0o1777)  # mkdir's mode is cut by the umask
    return directory


def _lock(directory: int, name: str) -> int:
    """Return the file descriptor of the locked file. Raises OSError if another process holds the lock.

    A file is opened for reading only and never changed unless it was made here: in a folder that everybody may write
    to, a name may be a link to anything.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        file = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=directory)
        os.fchmod(file, 0o444)
    except FileExistsError:
        file = os.open(name, flags, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", name)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


@contextlib.contextmanager
def _turn(directory: int) -> Iterator[None]:
    """Let one process claim at a time, or each of two that start together gets half of what one alone would get."""
    file, until = None, time.monotonic() + TURN_S
    while file is None and time.monotonic() < until:
        try:
            file = _lock(directory, "turn")
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    try:
        yield
    finally:
        if file is not None:
            os.close(file)

"""CPU use of other programs while a managed model server computes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

IDLE_FIELDS = (3, 4)
"""idle and iowait in the lines of /proc/stat. Time that a hypervisor gave away counts as used by others."""
GUEST_FIELDS = slice(8, None)
"""Already counted as user time."""


class CpuLoad:
    """Compares two readings of /proc for the logical CPUs ``cpus``."""

    def __init__(self, cpus: Iterable[int], root: Path = Path("/")) -> None:
        self._names = {f"cpu{cpu}" for cpu in cpus}
        self._proc = root / "proc"
        self._previous: tuple[float, float, float] | None = None

    def cores_used_by_others(self, group: int) -> float | None:
        """Return the average number of CPUs used since the last call by programs outside this process and the process
        group ``group``. Returns None at the first call."""
        now = (time.monotonic(), self._busy_ticks(), self._own_ticks(group))
        previous, self._previous = self._previous, now
        if previous is None or now[0] <= previous[0]:
            return None
        busy_ticks, own_ticks = now[1] - previous[1], now[2] - previous[2]
        # The time of one of our processes that has ended is missing from the reading.
        return max(0.0, busy_ticks - max(0.0, own_ticks)) / os.sysconf("SC_CLK_TCK") / (now[0] - previous[0])

    def _busy_ticks(self) -> float:
        ticks = 0
        with contextlib.suppress(OSError):
            for line in (self._proc / "stat").read_text().splitlines():
                name, *fields = line.split()
                if name in self._names:
                    numbers = [int(field) for field in fields]
                    ticks += sum(numbers) - sum(numbers[i] for i in IDLE_FIELDS) - sum(numbers[GUEST_FIELDS])
        return ticks

    def _own_ticks(self, group: int) -> float:
        ticks = 0
        for entry in self._proc.iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # the process has ended
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == group or int(entry.name) == os.getpid():
                        ticks += int(fields[11]) + int(fields[12])
        return ticks

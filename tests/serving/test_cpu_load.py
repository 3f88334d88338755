"""CPU use of other programs, from made-up readings of /proc and from the real one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlaif.serving.cpu_load import CpuLoad

TICKS = os.sysconf("SC_CLK_TCK")


def write(proc: Path, cpus: dict[int, list[int]], processes: dict[int, tuple[int, int, int]]) -> None:
    """``cpus``: the fields of /proc/stat. ``processes``: (process group, utime, stime) by number."""
    proc.mkdir(exist_ok=True)
    lines = [f"cpu{number} {' '.join(map(str, fields))}" for number, fields in cpus.items()]
    (proc / "stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 5 0"]) + "\n")
    for number, (group, user, system) in processes.items():
        (proc / str(number)).mkdir(exist_ok=True)
        fields = f"S 1 {group} 9 0 -1 4194304 1 0 0 0 {user} {system} 0 0 20 0 1 0"
        (proc / str(number) / "stat").write_text(f"{number} (a) odd) name) {fields}")


def test_the_group_and_this_process_do_not_count_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rlaif.serving.cpu_load.time.monotonic", lambda: now[0])
    load, proc, me = CpuLoad([0, 1], tmp_path), tmp_path / "proc", os.getpid()
    idle = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    write(proc, {0: idle, 1: idle, 2: idle}, {me: (me, 0, 0), 70: (70, 0, 0), 71: (70, 0, 0), 80: (80, 0, 0)})
    assert load.cores_used_by_others(70) is None
    now[0] += 10
    full = 10 * TICKS
    # CPU 0 is busy with user time that includes guest time. CPU 1 is half idle, and the hypervisor gave a fifth away.
    cpu0 = [full, 0, 0, 0, 0, 0, 0, 0, full // 2, 0]
    cpu1 = [3 * full // 10, 0, 0, full // 4, full // 4, 0, 0, full // 5, 0, 0]
    write(
        proc,
        {0: cpu0, 1: cpu1, 2: [full, 0, 0, 0, 0, 0, 0, 0, 0, 0]},
        {me: (me, full // 10, 0), 70: (70, full // 2, 0), 71: (70, 0, full // 10), 80: (80, full, full)},
    )
    assert load.cores_used_by_others(70) == pytest.approx(1.0 + 0.5 - 0.1 - 0.6)
    now[0] += 10
    assert load.cores_used_by_others(70) == 0.0


def test_a_busy_neighbor_counts_and_a_busy_member_does_not() -> None:
    cpu = min(os.sched_getaffinity(0))
    spin = f"import os, time\nos.sched_setaffinity(0, {{{cpu}}})\nend = time.time() + 20\nwhile time.time() < end: pass"
    busy = subprocess.Popen([sys.executable, "-c", spin], start_new_session=True)
    try:
        other, member = CpuLoad([cpu]), CpuLoad([cpu])
        other.cores_used_by_others(1)
        member.cores_used_by_others(busy.pid)
        time.sleep(2)
        with_it, without = other.cores_used_by_others(1), member.cores_used_by_others(busy.pid)
    finally:
        busy.kill()
        busy.wait()
    assert with_it is not None
    assert without is not None
    assert with_it > without
    assert with_it > 0.1

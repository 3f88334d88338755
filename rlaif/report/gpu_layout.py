"""Propose how to spread a model over the GPUs of one machine, for `rlaif doctor`.

With the same GPUs, data parallelism has more throughput than tensor parallelism. So a model is split over as few GPUs
as can hold its weights and a KV cache, and replicated on the rest. The rule uses sizes, not speeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
USABLE_FRACTION = 0.9
"""Share of a GPU's memory that vLLM uses: its default gpu_memory_utilization."""
RESERVED_FRACTION = 0.2
"""Share of a GPU's memory for other data than weights: activations, CUDA graphs, and a KV cache of useful size."""


@dataclass(frozen=True)
class ModelSize:
    """Size of a model. ``gib``: all weights on disk. ``attention_heads``: tensor parallelism divides them."""

    gib: float
    attention_heads: int | None = None


@dataclass(frozen=True)
class GpuLayout:
    """Proposed settings.

    ``vllm``: by vLLM's names; empty if none are needed. ``reason``: text. If the model does not fit, ``fits`` is False
    and ``reason`` names what it needs.
    """

    fits: bool
    vllm: Mapping[str, int]
    reason: str

    def as_toml(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.vllm.items())


def propose_layout(gpus: Sequence[float], size: ModelSize) -> GpuLayout:
    """Propose settings for a model of ``size`` on ``gpus``, given by memory in GiB; the smallest one counts for all."""
    if not gpus:
        return GpuLayout(True, {}, "no GPU: one vLLM server on the CPU")
    memory = min(gpus)
    room = memory * (USABLE_FRACTION - RESERVED_FRACTION)
    splits = [n for n in (1, 2, 4, 8, 16) if not size.attention_heads or size.attention_heads % n == 0]
    split = next((n for n in splits if size.gib / n <= room), None)
    if split is None or split > len(gpus):
        needed = f"{split} such GPUs" if split else "several machines"
        reason = f"{size.gib:,.0f} GiB of weights do not fit on {len(gpus)} x {memory:,.0f} GiB: "
        return GpuLayout(False, {}, reason + f"the model needs {needed}, or quantization")
    copies = len(gpus) // split
    sizes = {"tensor_parallel_size": split, "data_parallel_size": copies}
    idle = len(gpus) - split * copies
    reason = f"{size.gib:,.0f} GiB of weights, {copies} cop{'y' if copies == 1 else 'ies'} on {split} GPU(s) each"
    reason += f"; {idle} GPU(s) unused" if idle else ""
    return GpuLayout(True, {name: n for name, n in sizes.items() if n > 1}, reason)


def max_parameters(gpus: Sequence[float], split: int) -> float:
    """Return how many billion parameters ``split`` of the GPUs hold in 16 bits."""
    return min(gpus) * (USABLE_FRACTION - RESERVED_FRACTION) * split * GIB / 2 / 1e9


def model_size(folder: Path) -> ModelSize | None:
    """Read a model's size from the index in ``folder``, or else from its files; None if it has no weights."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        size = float(index["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError):
        size = float(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    if not size:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = (config.get("text_config") or config).get("num_attention_heads")
    except (OSError, ValueError, AttributeError):
        heads = None
    return ModelSize(size / GIB, heads if isinstance(heads, int) and heads > 0 else None)

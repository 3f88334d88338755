"""How a model is spread over the GPUs of one machine: what `rlaif doctor` proposes under ``[sampler.vllm]``.

Data parallelism answers more at once than tensor parallelism does with the same GPUs, so a model is split over as few
of them as hold its weights with room for the cache, and copied over the rest. The rule knows sizes, not speeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
USABLE_FRACTION = 0.9
"""Of a GPU's memory: vLLM's own gpu_memory_utilization."""
RESERVED_FRACTION = 0.2
"""Of a GPU's memory, for what is not weights: activations, CUDA graphs, and a KV cache that is worth having."""


@dataclass(frozen=True)
class ModelSize:
    """``gib``: of all weights as they lie on the disk. ``attention_heads``: of attention, which tensor parallelism
    divides."""

    gib: float
    attention_heads: int | None = None


@dataclass(frozen=True)
class GpuLayout:
    """``vllm``: the settings, in vLLM's names; empty where one GPU is all there is and enough. ``reason`` in words;
    where the model does not fit, ``fits`` is False and ``reason`` says what would."""

    fits: bool
    vllm: Mapping[str, int]
    reason: str

    def as_toml(self) -> str:
        return ", ".join(f"{name} = {value}" for name, value in self.vllm.items())


def propose_layout(gpus: Sequence[float], size: ModelSize) -> GpuLayout:
    """Settings for a model of ``size`` on GPUs with so many GiB each. The smallest GPU counts for all. Without a GPU:
    none."""
    if not gpus:
        return GpuLayout(True, {}, "no GPU: one vLLM on the CPU")
    memory = min(gpus)
    room = memory * (USABLE_FRACTION - RESERVED_FRACTION)
    splits = [n for n in (1, 2, 4, 8, 16) if not size.attention_heads or size.attention_heads % n == 0]
    split = next((n for n in splits if size.gib / n <= room), None)
    if split is None or split > len(gpus):
        needed = f"{split} such GPUs" if split else "several machines"
        return GpuLayout(False, {}, f"{size.gib:,.0f} GiB of weights do not fit on {len(gpus)} x {memory:,.0f} GiB: "
                              f"it wants {needed}, or a quantised model")  # fmt: skip
    copies = len(gpus) // split
    sizes = {"tensor_parallel_size": split, "data_parallel_size": copies}
    idle = len(gpus) - split * copies
    reason = f"{size.gib:,.0f} GiB of weights, {copies} cop{'y' if copies == 1 else 'ies'} on {split} GPU(s) each"
    return GpuLayout(
        True, {name: n for name, n in sizes.items() if n > 1}, reason + (f"; {idle} left over" if idle else "")
    )


def max_parameters(gpus: Sequence[float], split: int) -> float:
    """Billions of parameters in 16 bits that ``split`` of the GPUs hold."""
    return min(gpus) * (USABLE_FRACTION - RESERVED_FRACTION) * split * GIB / 2 / 1e9


def model_size(folder: Path) -> ModelSize | None:
    """What a model's folder says of its size, or None where it holds no weights: from the index, else the files."""
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

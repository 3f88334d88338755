"""Choice of the dtype in which a model is served on a CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlaif import cpu
from rlaif.serving import checkpoint

PARALLELISM_OPTIONS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
GIB = 2**30
KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
DEFAULT_KV_CACHE_GIB = 2
"""KV cache per worker unless the environment sets another size. vLLM's own default is half of the memory."""
PROCESS_OVERHEAD_BYTES = 3 * GIB
"""Memory of vLLM's three processes besides weights and KV cache."""


@dataclass(frozen=True)
class Precision:
    """A dtype to add to vLLM's options, or None if rlaif does not choose it, and the reason in one clause."""

    dtype: cpu.Dtype | None
    reason: str

    def __str__(self) -> str:
        return f"{self.dtype} ({self.reason})" if self.dtype else self.reason


def choose_dtype(
    model: str,
    options: Mapping[str, Any],
    processor: cpu.Cpu,
    memory: int | None,
    environ: Mapping[str, str] = os.environ,
) -> Precision:
    """Return the dtype for ``model`` (a path or a name on the hub) with vLLM's ``options`` on ``processor``.

    A dtype set by the user is kept, and the dtype of quantized weights is left to vLLM: most quantizations support 16
    bits only. If the weights do not fit into ``memory`` bytes as float32, bfloat16 is used although it is slow.
    """
    normalized = {name.replace("-", "_"): value for name, value in options.items()}
    if "dtype" in normalized:
        return Precision(None, f"dtype {normalized['dtype']}, as set")
    folder = checkpoint.model_folder(model, normalized.get("revision"))
    if normalized.get("quantization") or checkpoint.is_quantized(folder):
        return Precision(None, "quantized, in vLLM's own dtype")
    choice = cpu.serving_dtype(processor, environ)
    if choice.dtype == "float32" and memory is not None:
        weights = (checkpoint.float32_bytes(folder) or 0) * _worker_count(normalized.get("data_parallel_size"))
        needed = weights + count_workers(normalized) * kv_cache_gib(environ) * GIB + PROCESS_OVERHEAD_BYTES
        if weights and needed > memory:
            return Precision(
                "bfloat16",
                f"slow here: {choice.reason}; as float32 the model needs {needed / GIB:.1f} GiB of memory, "
                f"but only {memory / GIB:.1f} GiB are available",
            )
    return Precision(choice.dtype, choice.reason)


def count_workers(options: Mapping[str, Any]) -> int:
    """Return the number of workers of one vLLM with these options, whose names have underscores."""
    return math.prod(_worker_count(options.get(name)) for name in PARALLELISM_OPTIONS)


def _worker_count(value: Any) -> int:
    """Return ``value`` if it is a valid number of workers, otherwise 1: vLLM rejects invalid values itself."""
    return value if isinstance(value, int) and value > 0 else 1


def kv_cache_gib(environ: Mapping[str, str] = os.environ) -> int:
    """Return the size of a worker's KV cache in GiB."""
    value = environ.get(KV_CACHE_VARIABLE, "")
    return int(value) if value.isdigit() else DEFAULT_KV_CACHE_GIB

"""Facts about a model from its files, before it is loaded: folder, quantization and size."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlaif.serving import demo_model

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def model_folder(model: str, revision: str | None = None) -> Path:
    """Return the folder of a model: its own path, or its folder in the hub's cache. Downloads nothing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if model == demo_model.DEMO_MODEL:
        return demo_model.cache_dir() / demo_model.CHECKPOINT_DIR_NAME
    if Path(model).is_dir():
        return Path(model)
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return Path(model)
    return Path(cached).parent if isinstance(cached, str) else Path(model)


def read_model_config(folder: Path) -> Mapping[str, Any]:
    """Return the contents of config.json, or {} if it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def is_quantized(folder: Path) -> bool:
    """Return True if the weights are quantized (AWQ, GPTQ, FP8, compressed-tensors, GGUF and others)."""
    config = read_model_config(folder)
    text_config = config.get("text_config")
    configs = [config, text_config if isinstance(text_config, dict) else {}]
    has_quantization_config = any(
        section.get(name) for section in configs for name in ("quantization_config", "compression_config")
    )
    return has_quantization_config or folder.suffix == ".gguf" or (folder / "hf_quant_config.json").exists()


def float32_bytes(folder: Path) -> int | None:
    """Return the size of the weights as float32 in bytes, or None if it is unknown."""
    files = list(_safetensors_files(folder))
    try:
        return sum(4 * _parameter_count(file) for file in files) if files else _pytorch_bytes(folder)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def _safetensors_files(folder: Path) -> Iterator[Path]:
    """Yield the files that the index names, or all files without an index. Repositories may contain the weights
    twice."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        yield from (folder / name for name in sorted(set(index["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        single = folder / "model.safetensors"
        yield from [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def _parameter_count(file: Path) -> int:
    """Return the number of weights in a safetensors file, from its header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _pytorch_bytes(folder: Path) -> int | None:
    """Return the size as float32 of a torch.save checkpoint, by the dtype in its config (default: 16 bits)."""
    size = sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
    config = read_model_config(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return size * 4 // DTYPE_BYTES.get(dtype, 2) if size else None

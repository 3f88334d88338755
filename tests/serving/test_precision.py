"""The dtype of a model served on a CPU depends on the processor, the options, the model's files and the memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from rlaif import cpu
from rlaif.serving import checkpoint, demo_model
from rlaif.serving.checkpoint import float32_bytes, is_quantized, model_folder
from rlaif.serving.precision import GIB, Precision, choose_dtype, count_workers
from tests.conftest import ROOT


def load_cpu(name: str) -> cpu.Cpu:
    return cpu.parse_cpuinfo((ROOT / "tests" / "cpuinfo" / f"{name}.txt").read_text())


def safetensors(file: Path, shape: list[int], dtype: str = "BF16") -> None:
    """Write a file with a header only, as nothing else is read."""
    header = {"__metadata__": {"format": "pt"}, "weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 2 billion weights, 8 GB in float32."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors(folder / "model.safetensors", [1_000_000, 2_000])
    return folder


def test_the_dtype_depends_on_the_processor(model: Path) -> None:
    assert choose_dtype(str(model), {}, load_cpu("zen3"), None, {}) == Precision(
        "float32", "no avx512_bf16 or amx_bf16"
    )
    chosen = choose_dtype(str(model), {}, load_cpu("sapphire_rapids"), None, {})
    assert (chosen, str(chosen)) == (Precision("bfloat16", "amx_bf16"), "bfloat16 (amx_bf16)")


def test_a_dtype_set_by_the_user_is_kept(model: Path) -> None:
    chosen = choose_dtype(str(model), {"dtype": "float16"}, load_cpu("zen3"), None, {})
    assert str(chosen) == "dtype float16, as set"
    assert chosen.dtype is None


@pytest.mark.parametrize(
    "config",
    [{"quantization_config": {"quant_method": "awq"}}, {"compression_config": {"format": "pack-quantized"}},
     {"text_config": {"quantization_config": {"quant_method": "gptq"}}}],
)  # fmt: skip
def test_a_quantized_model_keeps_vllms_own_dtype(model: Path, config: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps(config))
    assert choose_dtype(str(model), {}, load_cpu("zen3"), GIB, {}) == Precision(None, "quantized, in vLLM's own dtype")


def test_quantization_is_detected_by_option_file_or_suffix(model: Path) -> None:
    assert choose_dtype(str(model), {"quantization": "gptq"}, load_cpu("zen3"), None, {}).dtype is None
    assert not is_quantized(model)
    (model / "hf_quant_config.json").touch()
    assert is_quantized(model)
    assert is_quantized(Path("some/model.gguf"))
    (model / "hf_quant_config.json").unlink()
    for text in ("[]", "{", '{"text_config": 3}'):
        (model / "config.json").write_text(text)
        assert not is_quantized(model)


@pytest.mark.parametrize(
    ("memory_gib", "options", "dtype"),
    [(13, {}, "float32"), (12, {}, "bfloat16"), (14, {"tensor_parallel_size": 2}, "bfloat16"),
     (15, {"tensor_parallel_size": 2}, "float32"), (16, {"data-parallel-size": 2}, "bfloat16")],
)  # fmt: skip
def test_weights_that_do_not_fit_as_float32_stay_in_bfloat16(
    model: Path, memory_gib: int, options: dict[str, Any], dtype: str
) -> None:
    """7.45 GiB of weights, 2 GiB of cache per worker and 3 GiB for the processes."""
    chosen = choose_dtype(str(model), options, load_cpu("zen3"), memory_gib * GIB, {})
    assert chosen.dtype == dtype


def test_the_reason_for_a_slow_dtype_is_reported(model: Path) -> None:
    chosen = choose_dtype(str(model), {}, load_cpu("zen3"), 12 * GIB, {})
    assert str(chosen) == (
        "bfloat16 (slow here: no avx512_bf16 or amx_bf16; as float32 the model needs 12.5 GiB of memory, "
        "but only 12.0 GiB are available)"
    )
    assert choose_dtype(str(model), {}, load_cpu("zen3"), 12 * GIB, {"VLLM_CPU_KVCACHE_SPACE": "1"}).dtype == "float32"
    assert choose_dtype(str(model), {}, load_cpu("zen4"), 12 * GIB, {}).reason == "avx512_bf16"


def test_a_model_of_unknown_size_is_assumed_to_fit(tmp_path: Path) -> None:
    assert choose_dtype("no-such/model", {}, load_cpu("zen3"), GIB, {}).dtype == "float32"
    assert choose_dtype("not a name", {}, load_cpu("zen3"), GIB, {}).dtype == "float32"


def test_sizes_are_read_from_headers_and_each_weight_counts_once(tmp_path: Path) -> None:
    assert float32_bytes(tmp_path) is None
    safetensors(tmp_path / "consolidated.safetensors", [10, 100])
    assert float32_bytes(tmp_path) == 4000
    safetensors(tmp_path / "a.safetensors", [5, 100], "F32")
    safetensors(tmp_path / "b.safetensors", [5, 100])
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert float32_bytes(tmp_path) == 4000
    (tmp_path / "b.safetensors").write_bytes(b"\xff")
    assert float32_bytes(tmp_path) is None


@pytest.mark.parametrize(("config", "size"), [("{}", 2000), ('{"torch_dtype": "float32"}', 1000)])
def test_a_torch_checkpoint_is_sized_by_its_files(tmp_path: Path, config: str, size: int) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\0" * 600)
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"\0" * 400)
    (tmp_path / "config.json").write_text(config)
    assert float32_bytes(tmp_path) == size


def test_model_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    assert model_folder("demo") == tmp_path / demo_model.CHECKPOINT_DIR_NAME
    assert model_folder(str(tmp_path)) == tmp_path
    cached = {("org/model", "v1"): str(tmp_path / "snapshot" / "config.json")}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, _file, revision=None: cached.get((name, revision))
    )
    assert model_folder("org/model", "v1") == tmp_path / "snapshot"
    assert model_folder("org/model") == Path("org/model")
    assert checkpoint.read_model_config(Path("org/model")) == {}


def test_workers_are_counted_for_any_option_values() -> None:
    assert count_workers({}) == 1
    assert count_workers({"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 4}) == 24
    assert count_workers({"tensor_parallel_size": "two", "data_parallel_size": 0}) == 1

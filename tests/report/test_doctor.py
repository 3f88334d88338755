"""Doctor: proposals for described machines, accepted by vLLM, and the report on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlaif import cpu
from rlaif.cpu import Core, Cores
from rlaif.report import doctor, gpu_layout
from rlaif.report.gpu_layout import ModelSize, propose_layout
from rlaif.serving import cores
from rlaif.serving.vllm_server import vllm_args
from tests.conftest import ROOT, needs

B = 2e9 / gpu_layout.GIB
"""GiB of a billion parameters in 16 bits."""
H100, A10 = 79.6, 22.5
MACHINES = {
    "8 x 80 GB, 8B": ([H100] * 8, ModelSize(8 * B, 32), {"data_parallel_size": 8}),
    "8 x 80 GB, 32B": ([H100] * 8, ModelSize(32.8 * B, 64), {"tensor_parallel_size": 2, "data_parallel_size": 4}),
    "8 x 80 GB, 70B": ([H100] * 8, ModelSize(70.6 * B, 64), {"tensor_parallel_size": 4, "data_parallel_size": 2}),
    "8 x 80 GB, 235B": ([H100] * 8, ModelSize(200 * B, 64), {"tensor_parallel_size": 8}),
    "2 x 24 GB, 8B": ([24.0] * 2, ModelSize(8 * B, 32), {"data_parallel_size": 2}),
    "2 x 24 GB, 14B": ([24.0] * 2, ModelSize(14.8 * B, 40), {"tensor_parallel_size": 2}),
    "6 x 24 GB, 14B": ([24.0] * 6, ModelSize(14.8 * B, 40), {"tensor_parallel_size": 2, "data_parallel_size": 3}),
    "the smaller of two counts": ([H100, A10], ModelSize(8 * B, 32), {"data_parallel_size": 2}),
    "14 heads, not split by 4": (
        [24.0] * 4,
        ModelSize(14 * B, 14),
        {"tensor_parallel_size": 2, "data_parallel_size": 2},
    ),
    "1 x 24 GB, 8B": ([24.0], ModelSize(8 * B, 32), {}),
    "no GPU": ([], ModelSize(8 * B, 32), {}),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_model_is_split_as_little_as_possible_and_replicated_on_the_rest(name: str) -> None:
    gpus, size, expected = MACHINES[name]
    layout = propose_layout(gpus, size)
    assert layout.fits
    assert layout.vllm == expected
    if gpus:
        split = expected.get("tensor_parallel_size", 1)
        assert size.gib / split < min(gpus) * gpu_layout.USABLE_FRACTION  # so that vLLM starts
        assert split * expected.get("data_parallel_size", 1) <= len(gpus)


def test_the_reason_names_what_a_model_that_does_not_fit_needs() -> None:
    assert (
        "do not fit on 2 x 24 GiB: the model needs 8 such GPUs"
        in propose_layout([24.0] * 2, ModelSize(70 * B, 64)).reason
    )
    assert "needs several machines" in propose_layout([24.0] * 8, ModelSize(670 * B, 128)).reason
    assert not propose_layout([24.0], ModelSize(70 * B, 64)).fits
    assert "1 GPU(s) unused" in propose_layout([24.0] * 3, ModelSize(14 * B, 40)).reason


def test_a_models_size_is_read_from_its_folder(tmp_path: Path) -> None:
    assert gpu_layout.model_size(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 2**20)
    assert gpu_layout.model_size(tmp_path) == ModelSize(1 / 1024, None)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 24}}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 3 * 2**30}}))
    assert gpu_layout.model_size(tmp_path) == ModelSize(3.0, 24)


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a stand-in for nvidia-smi, and a 14B model in a folder."""
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'NVIDIA RTX 4090, 24564\\nNVIDIA RTX 4090, 24564\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    model = tmp_path / "big"
    model.mkdir()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 29.6e9}}))
    return model


def test_the_doctor_proposes_settings_for_a_run_and_for_a_model(
    two_gpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rlaif: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "rlaif.toml").write_text(f'[sampler]\nmodel = "{two_gpus}"\n[judge]\nmodel = "org/absent"\n')
    stdout = rlaif("doctor", run).stdout
    assert "NVIDIA RTX 4090, 24 GiB; NVIDIA RTX 4090, 24 GiB" in stdout
    assert f"[sampler.vllm]     {two_gpus}: tensor_parallel_size = 2" in stdout
    assert "org/absent is not on this machine" in stdout
    assert "one holds up to 9B parameters in 16 bits, all together 18B" in rlaif("doctor").stdout
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "do not fit on 1 x 24 GiB" in rlaif("doctor", "--model", two_gpus, code=4).stdout


def finding_message(subject: str) -> str:
    """Return the message of the finding on ``subject``."""
    (finding,) = [finding for finding in doctor.diagnose() if finding.subject == subject]
    return finding.message


@pytest.mark.parametrize(
    ("name", "flags", "served"),
    [
        ("zen3", "AMD EPYC 7763 64-Core Processor: avx2", "float32 (no avx512_bf16 or amx_bf16)"),
        ("neoverse_v1", "ARM Neoverse V1: asimd, sve, i8mm, bf16", "bfloat16 (bf16)"),
    ],
)
def test_the_doctor_shows_the_processor_and_its_dtypes(
    monkeypatch: pytest.MonkeyPatch, name: str, flags: str, served: str
) -> None:
    processor = cpu.parse_cpuinfo((ROOT / "tests" / "cpuinfo" / f"{name}.txt").read_text())
    monkeypatch.setattr(cpu, "detect_cpu", lambda: processor)
    assert finding_message("CPU") == flags
    trained = cpu.training_dtype(processor)
    expected = f"on the CPU, models are served in {served} and trained in {trained.dtype} ({trained.reason})"
    assert finding_message("dtype") == expected


@pytest.mark.parametrize(
    ("allowed", "quota", "shown"),
    [
        (2, None, "2 usable: 0-1"),
        (8, None, "8 usable: 0-7; model servers leave 1 free"),
        (64, 4.0, "4 of 64 usable, because of a CPU quota of 4; model servers leave 1 free"),
    ],
)
def test_the_doctor_shows_the_usable_cores(
    monkeypatch: pytest.MonkeyPatch, allowed: int, quota: float | None, shown: str
) -> None:
    usable = Cores(tuple(Core(n, n) for n in range(allowed)), quota)
    monkeypatch.setattr(cpu, "usable_cores", lambda: usable)
    monkeypatch.delenv(cores.BIND_VARIABLE, raising=False)
    assert finding_message("cores") == shown
    monkeypatch.setenv(cores.BIND_VARIABLE, "0")
    assert finding_message("cores") == f"{shown}; VLLM_CPU_OMP_THREADS_BIND=0, as set"


def test_the_doctor_shows_the_dtype_of_a_model_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rlaif: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert (
        f"{model}: no settings needed without a GPU; quantized, in vLLM's own dtype"
        in rlaif("doctor", "--model", model).stdout
    )


def test_vllm_accepts_the_proposals() -> None:
    needs("vllm")
    proposed = [{**expected, "gpu_memory_utilization": 0.9} for _, _, expected in MACHINES.values()]
    lines = [vllm_args("some/model", "cuda", settings) for settings in proposed]
    code = (
        "import json, sys\nfrom vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "for line in json.load(sys.stdin):\n"
        "    read = make_arg_parser(FlexibleArgumentParser()).parse_args(line)\n"
        "    print('parsed', read.tensor_parallel_size, read.data_parallel_size, read.gpu_memory_utilization)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("parsed")]
    assert read == [
        [str(settings.get("tensor_parallel_size", 1)), str(settings.get("data_parallel_size", 1)), "0.9"]
        for settings in proposed
    ]

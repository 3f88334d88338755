"""What `rlaif train` costs over a bare TRL script with the same settings, in the same process on the same pairs.

    python benchmarks/train_cost.py [--model demo] [--pairs 32] [--steps 4] [--max-length 256] [--repeat 6]

Both train LoRA by DPO with TRL's trainer; the bare script is TRL's own example, with rlaif's settings handed to it as
they are. Only training is timed (``trainer.train``): rlaif's preflight and held-out measurement happen before and after
it, and are printed beside. They take turns, and who begins changes, so that what else runs on the machine meets both
alike. The ratio is the geometric mean over the turns with its 95 % t-interval. On CUDA the peak memory of each is
printed too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import polars as pl

from rlaif.config import Config
from rlaif.llm import demo
from rlaif.run.directory import Run
from rlaif.train import loop, methods, settings

BATCH = 4
SENTENCE = "the river runs past old stone houses where people bake bread and talk about rain "


def rows(count: int, tokens: int) -> list[dict[str, object]]:
    long = SENTENCE * (tokens // 15 + 1)
    return [
        {
            "prompt": [{"role": "user", "content": f"Write about topic {place}."}],
            "chosen": [{"role": "assistant", "content": long[: tokens * 4] + f" {place}."}],
            "rejected": [{"role": "assistant", "content": long[: tokens * 2] + f" not {place}."}],
            "prompt_id": str(place),
        }
        for place in range(count)
    ]


def bare(run: Run, config: Config, folder: Path) -> tuple[float, float]:
    """(seconds of training, seconds in all) of TRL by itself."""
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    began = time.monotonic()
    frame = pl.read_parquet(run.dataset / "train.parquet")
    arguments = settings.arguments(config.train, seed=config.seed, folder=folder, pairs=frame.height)
    path = demo.resolve(str(config.train.model))
    trainer = DPOTrainer(
        model=path,
        args=DPOConfig(**arguments),
        train_dataset=methods.preferences(frame),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(
            r=config.train.lora_r,
            lora_alpha=config.train.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    started = time.monotonic()
    trainer.train()
    return time.monotonic() - started, time.monotonic() - began


def ours(run: Run, config: Config) -> tuple[float, float]:
    began = time.monotonic()
    result = loop.train(run, config, say=lambda _line: None)
    return result.seconds, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=6)
    options = parser.parse_args()
    import torch

    times: dict[str, list[tuple[float, float]]] = {"bare TRL": [], "rlaif": []}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        run.dataset.mkdir(parents=True)
        pl.DataFrame(rows(options.pairs, options.max_length // 3)).write_parquet(run.dataset / "train.parquet")
        for turn in range(options.repeat + 1):  # the first pays for what is loaded once
            for name in list(times)[:: 1 if turn % 2 else -1]:
                output = Path(folder) / f"{name}-{turn}"
                wanted = {"model": options.model, "max_steps": options.steps, "max_length": options.max_length,
                          "batch_size": BATCH, "merge": False, "output": str(output)}  # fmt: skip
                config = Config.model_validate({"train": wanted})
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                took = bare(run, config, output) if name == "bare TRL" else ours(run, config)
                if torch.cuda.is_available():
                    peaks[name] = torch.cuda.max_memory_allocated() / 2**30
                if turn:
                    times[name].append(took)
                    print(f"{name}: {took[0]:.1f} s of training, {took[1]:.1f} s in all", flush=True)
    print(
        "\n| | pairs/s (median of", options.repeat, ") | lowest, highest | in all | peak GiB |\n|---|---|---|---|---|"
    )
    done = options.steps * BATCH
    for name, taken in times.items():
        rates = sorted(done / seconds for seconds, _ in taken)
        peak = f"{peaks[name]:.1f}" if name in peaks else ""
        whole = statistics.median(whole for _, whole in taken)
        print(f"| {name} | {statistics.median(rates):.3f} | {rates[0]:.3f}, {rates[-1]:.3f} | {whole:.1f} s | {peak} |")
    ratios = [math.log(a[0] / b[0]) for a, b in zip(times["rlaif"], times["bare TRL"], strict=True)]
    middle, low, high = interval(ratios)
    print(f"\nrlaif takes {middle:.3f} [{low:.3f}, {high:.3f}] times as long as bare TRL, n = {len(ratios)} turns")


def interval(logs: list[float]) -> tuple[float, float, float]:
    """The geometric mean of what ``logs`` are the logarithms of, with its 95 % t-interval; two at least."""
    from scipy.stats import t

    middle = statistics.fmean(logs)
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


if __name__ == "__main__":
    main()

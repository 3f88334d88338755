"""Measure the overhead of `rlaif train` over a bare TRL script with the same settings, process and pairs.

    python -m benchmarks.train_cost [--model demo] [--pairs 32] [--steps 4] [--max-length 256] [--repeat 6]

Both train LoRA with DPO and TRL's trainer. The bare script is TRL's own example with rlaif's settings. The comparison
is of the training itself (``trainer.train``, including its last checkpoint). "In all" is the time from the dataset file
to the saved adapter, without imports. rlaif's includes its preflight, its model card, and the held-out pairs measured
before and after training (one per eight training pairs), which the bare script does not have.

Without CUDA, rlaif makes TRL compute logits only at the answers' tokens (``metrics.patch_answer_only_logits``), as TRL
does by itself on CUDA. So without CUDA the bare script runs in two variants: unchanged, and with the same patch. The
second is the fair comparison.

All variants take turns, in a different order each time, so that other load on the machine affects them equally. The
first turn is not counted. A ratio is the geometric mean over the turns with its 95 % t-interval. On CUDA, the peak
memory of each variant is also printed.
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from rlaif.config.models import Config
from rlaif.run.run import Run
from rlaif.serving import demo_model
from rlaif.train import metrics, trainer, trl_config

BATCH = 4
BARE_ANSWER_ONLY = "bare TRL, scoring answers only"
SENTENCE = "the river runs past old stone houses where people bake bread and talk about rain "


def make_rows(count: int, tokens: int) -> list[dict[str, object]]:
    long = SENTENCE * (tokens // 15 + 1)
    return [
        {
            "prompt": [{"role": "user", "content": f"Write about topic {index}."}],
            "chosen": [{"role": "assistant", "content": long[: tokens * 4] + f" {index}."}],
            "rejected": [{"role": "assistant", "content": long[: tokens * 2] + f" not {index}."}],
            "prompt_id": str(index),
        }
        for index in range(count)
    ]


def train_bare(run: Run, config: Config, folder: Path) -> tuple[float, float]:
    """Train with TRL alone, and return the seconds of training and in all."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    start = time.monotonic()
    path = demo_model.resolve_model(str(config.train.model))
    dpo_trainer = DPOTrainer(
        model=path,
        args=DPOConfig(**trl_config.trl_config_kwargs(config.train, seed=config.seed, folder=folder, pairs=BATCH)),
        train_dataset=Dataset.from_parquet(str(run.dataset / "train.parquet"), cache_dir=str(folder)),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(
            r=config.train.lora_r,
            lora_alpha=config.train.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    started = time.monotonic()
    dpo_trainer.train()
    seconds = time.monotonic() - started
    dpo_trainer.save_model(str(folder / "adapter"))
    return seconds, time.monotonic() - start


def train_bare_answer_only(run: Run, config: Config, folder: Path) -> tuple[float, float]:
    """Train with TRL alone and the patch that rlaif applies without CUDA."""
    with metrics.patch_answer_only_logits():
        return train_bare(run, config, folder)


def train_rlaif(run: Run, config: Config, _folder: Path) -> tuple[float, float]:
    """Train with rlaif, and return the seconds of training and in all."""
    start = time.monotonic()
    result = trainer.train(run, config, log=lambda _line: None)
    return result.seconds, time.monotonic() - start


Trainer = Callable[[Run, Config, Path], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=6)
    options = parser.parse_args()
    if options.repeat < 2:
        parser.error("--repeat must be at least 2, because one turn has no interval")
    import torch

    trainers: dict[str, Trainer] = {"bare TRL": train_bare}
    if not torch.cuda.is_available():
        trainers[BARE_ANSWER_ONLY] = train_bare_answer_only
    trainers["rlaif"] = train_rlaif
    times, peaks = measure(trainers, options)
    print_tables(times, peaks, options)


def measure(
    trainers: Mapping[str, Trainer], options: argparse.Namespace
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Let the trainers take turns. Returns the seconds of each turn, and on CUDA the peak memory in GiB, by name."""
    import torch

    cuda = torch.cuda.is_available()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        run.dataset.mkdir(parents=True)
        all_rows = make_rows(options.pairs + options.pairs // 8, options.max_length // 3)
        pl.DataFrame(all_rows[: options.pairs]).write_parquet(run.dataset / "train.parquet")
        pl.DataFrame(all_rows[options.pairs :]).write_parquet(run.dataset / "test.parquet")
        for turn in range(options.repeat + 1):
            for name in turn_order(list(trainers), turn):
                output = Path(folder) / f"{list(trainers).index(name)}-{turn}"
                train_config = {
                    "model": options.model,
                    "max_steps": options.steps,
                    "max_length": options.max_length,
                    "batch_size": BATCH,
                    "merge": False,
                    "output": str(output),
                }
                config = Config.model_validate({"train": train_config})
                gc.collect()  # frees the previous trainer
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                elapsed = trainers[name](run, config, output)
                shutil.rmtree(output)
                if cuda:
                    peaks[name] = torch.cuda.max_memory_allocated() / 2**30
                if turn:
                    times[name].append(elapsed)
                    print(f"{name}: {elapsed[0]:.1f} s of training, {elapsed[1]:.1f} s in all", flush=True)
    return times, peaks


def turn_order(names: list[str], turn: int) -> list[str]:
    """Rotate ``names`` by ``turn``, and reverse every other full rotation."""
    first = turn % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if turn // len(names) % 2 else order


def print_tables(
    times: Mapping[str, list[tuple[float, float]]], peaks: Mapping[str, float], options: argparse.Namespace
) -> None:
    print(f"\n| | pairs/s (median of {options.repeat}) | lowest, highest | in all | peak GiB |\n|---|---|---|---|---|")
    pairs_trained = options.steps * BATCH
    for name, durations in times.items():
        rates = sorted(pairs_trained / seconds for seconds, _ in durations)
        peak = f"{peaks[name]:.1f}" if name in peaks else ""
        total = statistics.median(total_seconds for _, total_seconds in durations)
        print(f"| {name} | {statistics.median(rates):.3f} | {rates[0]:.3f}, {rates[-1]:.3f} | {total:.1f} s | {peak} |")
    print()
    for name in list(times)[:-1]:
        ratios = [math.log(a[0] / b[0]) for a, b in zip(times["rlaif"], times[name], strict=True)]
        middle, low, high = geometric_mean_interval(ratios)
        print(f"rlaif takes {middle:.3f} [{low:.3f}, {high:.3f}] times as long as {name}, n = {len(ratios)} turns")


def geometric_mean_interval(logs: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of the values with these ``logs`` (at least two), and its 95 % t-interval."""
    from scipy.stats import t

    middle = statistics.fmean(logs)
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


if __name__ == "__main__":
    main()

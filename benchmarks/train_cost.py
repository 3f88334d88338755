"""What `rlaif train` costs over a bare TRL script with the same settings, in the same process on the same pairs.

    python -m benchmarks.train_cost [--model demo] [--pairs 32] [--steps 4] [--max-length 256] [--repeat 6]

Both train LoRA by DPO with TRL's trainer; the bare script is TRL's own example, with rlaif's settings handed to it as
they are. What is compared is training (``trainer.train``, its last checkpoint included). "In all" counts from the
dataset's file to the saved adapter, without the imports; rlaif's has its preflight, its model card, and the held-out
pairs measured before and after (one for each eight that are trained on), which the bare script does not.

Off CUDA rlaif has TRL compute the vocabulary's scores at the answers' tokens only (``measure.only_answers_scored``), as
TRL does by itself on CUDA. So there the bare script takes part twice: as it is, and with the same done to it, which is
what rlaif is compared with.

All take turns, in another order each time, so that what else runs on the machine meets them alike; the first turn is
not counted. A ratio is the geometric mean over the turns with its 95 % t-interval. On CUDA the peak memory of each is
printed too.
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import polars as pl

from rlaif.config import Config
from rlaif.llm import demo
from rlaif.run.directory import Run
from rlaif.train import loop, measure, settings

BATCH = 4
LIKENED = "bare TRL, scoring answers only"
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
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    began = time.monotonic()
    path = demo.resolve(str(config.train.model))
    trainer = DPOTrainer(
        model=path,
        args=DPOConfig(**settings.arguments(config.train, seed=config.seed, folder=folder, pairs=BATCH)),
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
    trainer.train()
    seconds = time.monotonic() - started
    trainer.save_model(str(folder / "adapter"))
    return seconds, time.monotonic() - began


def likened(run: Run, config: Config, folder: Path) -> tuple[float, float]:
    """TRL by itself, with the one switch that rlaif sets off CUDA."""
    with measure.only_answers_scored():
        return bare(run, config, folder)


def ours(run: Run, config: Config, _folder: Path) -> tuple[float, float]:
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
    if options.repeat < 2:
        parser.error("--repeat takes two at least: one turn has no interval")
    import torch

    cuda = torch.cuda.is_available()
    ways = {"bare TRL": bare, "rlaif": ours} if cuda else {"bare TRL": bare, LIKENED: likened, "rlaif": ours}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run")
        run.dataset.mkdir(parents=True)
        made = rows(options.pairs + options.pairs // 8, options.max_length // 3)
        pl.DataFrame(made[: options.pairs]).write_parquet(run.dataset / "train.parquet")
        pl.DataFrame(made[options.pairs :]).write_parquet(run.dataset / "test.parquet")
        for turn in range(options.repeat + 1):
            order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
            for name in order[:: -1 if turn // len(ways) % 2 else 1]:
                output = Path(folder) / f"{list(ways).index(name)}-{turn}"
                wanted = {"model": options.model, "max_steps": options.steps, "max_length": options.max_length,
                          "batch_size": BATCH, "merge": False, "output": str(output)}  # fmt: skip
                config = Config.model_validate({"train": wanted})
                gc.collect()  # the trainer before this one
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                took = ways[name](run, config, output)
                shutil.rmtree(output)
                if cuda:
                    peaks[name] = torch.cuda.max_memory_allocated() / 2**30
                if turn:
                    times[name].append(took)
                    print(f"{name}: {took[0]:.1f} s of training, {took[1]:.1f} s in all", flush=True)
    print(f"\n| | pairs/s (median of {options.repeat}) | lowest, highest | in all | peak GiB |\n|---|---|---|---|---|")
    done = options.steps * BATCH
    for name, taken in times.items():
        rates = sorted(done / seconds for seconds, _ in taken)
        peak = f"{peaks[name]:.1f}" if name in peaks else ""
        whole = statistics.median(whole for _, whole in taken)
        print(f"| {name} | {statistics.median(rates):.3f} | {rates[0]:.3f}, {rates[-1]:.3f} | {whole:.1f} s | {peak} |")
    print()
    for name in list(ways)[:-1]:
        ratios = [math.log(a[0] / b[0]) for a, b in zip(times["rlaif"], times[name], strict=True)]
        middle, low, high = interval(ratios)
        print(f"rlaif takes {middle:.3f} [{low:.3f}, {high:.3f}] times as long as {name}, n = {len(ratios)} turns")


def interval(logs: list[float]) -> tuple[float, float, float]:
    """The geometric mean of what ``logs`` are the logarithms of, with its 95 % t-interval; two at least."""
    from scipy.stats import t

    middle = statistics.fmean(logs)
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


if __name__ == "__main__":
    main()

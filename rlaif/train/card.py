"""OUTPUT/README.md: the model card, with the hub's YAML header, what it was trained on, how, and what was measured."""

from __future__ import annotations

from importlib.metadata import version as _version
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif.config import Config
from rlaif.train import methods, settings

if TYPE_CHECKING:
    import polars as pl

    from rlaif.train.prepare import Prepared
    from rlaif.train.writing import TrainResult


def write(path: Path, prepared: Prepared, config: Config, result: TrainResult) -> None:
    """Write the card to a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text(prepared, config, result), encoding="utf-8")
    temporary.replace(path)


def text(prepared: Prepared, config: Config, result: TrainResult) -> str:
    train = config.train
    rows = {
        "Method": methods.of(train.method).described(train),
        "Weights": f"LoRA, r = {train.lora_r}, alpha = {train.lora_alpha}, all linear layers" if train.lora else "all",
        "Learning rate": f"{settings.learning_rate(train):g}",
        "Steps": f"{result.steps} of {train.batch_size} {methods.of(train.method).UNIT}",
        "Longest sequence": f"{train.max_length} tokens",
        "Precision": settings.dtype(train),
        "Seed": str(config.seed),
        **{name: str(value) for name, value in settings.deciding(train.extra).items()},
    }
    scores = methods.of(train.method).HEAD == "score"
    base = Path(prepared.path).name if Path(prepared.path).is_dir() else prepared.model
    return f"""---
{_header(prepared, train.method, result)}---

# {f"A reward model from {base}" if scores else f"{base}, aligned with preferences"}

Trained from `{prepared.model}` with [TRL](https://github.com/huggingface/trl) by rlaif {_version("rlaif")}.

{_layout(result)}
## Data
{_data(prepared, config, result)}
Labelled by: {_sources(prepared.train)}.
The training file's sha256 is `{prepared.digest}`.

## Settings
| setting | value |
|---|---|
{_table(rows)}

## Results
{_results(result)}
How good the labels are stands in the dataset's card. No human evaluation of this model's answers was made here.

## Made with
{", ".join(f"{name} {_version(name)}" for name in ("trl", "peft", "transformers", "torch"))}
"""


def _header(prepared: Prepared, method: str, result: TrainResult) -> str:
    local = prepared.path != prepared.model or Path(prepared.path).exists()
    base = "" if local else f"base_model: {prepared.model}\n"  # the hub refuses a local path here
    library = "transformers" if result.merged else "peft"
    task = "text-classification" if methods.of(method).HEAD == "score" else "text-generation"
    return f"{base}library_name: {library}\npipeline_tag: {task}\ntags: [trl, {method}, rlaif]\n"


def _layout(result: TrainResult) -> str:
    parts = []
    if result.adapter:
        parts.append("- `adapter/`: the LoRA adapter, to be loaded over the base with peft or vLLM's `--lora-modules`")
    if result.merged:
        parts.append("- `merged/`: the whole model with tokenizer and chat template, for transformers and any server")
    return "\n".join(parts) + "\n"


def _data(prepared: Prepared, config: Config, result: TrainResult) -> str:
    unit = methods.of(config.train.method).UNIT
    if unit != "pairs":
        what = "prompts" if config.train.method == "rloo" else unit
        return f"{result.pairs} {what} of {prepared.train.height} preference pairs."
    why = "they are longer than" if methods.of(config.train.method).WHOLE else "their prompts fill"
    more = prepared.train.height - result.pairs
    left_out = f" ({more} more were left out: {why} the longest sequence)" if more else ""
    return f"{result.pairs} preference pairs{left_out}."


def _sources(frame: pl.DataFrame) -> str:
    if "source" not in frame.columns:
        return "not recorded"
    counts = frame["source"].value_counts(sort=True).iter_rows()
    return ", ".join(f"{source or 'not recorded'} {count}" for source, count in counts)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _results(result: TrainResult) -> str:
    loss = f"Final training loss {result.loss:.4f}.\n" if result.loss is not None else ""
    if result.accuracy_after is None:
        return f"{loss}Not measured on held-out pairs: the dataset has none.\n"
    what = "chosen answer likelier a token" if result.moved else "chosen answer scored higher"
    moved = f"| moved towards the chosen answer (chance is 0.5) | {result.moved} |\n" if result.moved else ""
    return f"""{loss}
| on held-out pairs, with 95 % interval | |
|---|---|
| {what}, before | {result.accuracy_before} |
| {what}, after | {result.accuracy_after} |
{moved}"""

"""OUTPUT/README.md: the model card, with the hub's YAML header, the training data, the settings and the results."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif import __version__
from rlaif.config.models import Config
from rlaif.run.atomic_write import atomic_path
from rlaif.train import methods, trl_config

if TYPE_CHECKING:
    import polars as pl

    from rlaif.train.artifacts import TrainResult
    from rlaif.train.prepare import PreparedTraining


def write_card(path: Path, prepared: PreparedTraining, config: Config, result: TrainResult) -> None:
    """Write the model card to ``path``. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_text(render_card(prepared, config, result), encoding="utf-8")


def render_card(prepared: PreparedTraining, config: Config, result: TrainResult) -> str:
    """Return the text of the model card."""
    train = config.train
    rows = {
        "Method": methods.get_method(train.method).describe(train),
        "Weights": f"LoRA, r = {train.lora_r}, alpha = {train.lora_alpha}, all linear layers" if train.lora else "all",
        "Learning rate": f"{trl_config.learning_rate(train):g}",
        "Steps": f"{result.steps} of {train.batch_size} {methods.get_method(train.method).row_unit}",
        "Maximum length": f"{train.max_length} tokens",
        "Precision": trl_config.dtype(train),
        "Seed": str(config.seed),
        **{name: str(value) for name, value in trl_config.weight_affecting(train.trl).items()},
    }
    scores = methods.get_method(train.method).head == "score"
    base = Path(prepared.path).name if Path(prepared.path).is_dir() else prepared.model
    return f"""---
{_header(prepared, train.method, result)}---

# {f"A reward model from {base}" if scores else f"{base}, aligned with preferences"}

Trained from `{prepared.model}` with [TRL](https://github.com/huggingface/trl) by rlaif {__version__}.

{_layout(result)}
## Data
{_data(prepared, config, result)}
Labeled by: {_sources(prepared.train)}.
The training file's sha256 is `{prepared.digest}`.

## Settings
| setting | value |
|---|---|
{_table(rows)}

## Results
{_results(result)}
The dataset's card describes the quality of the labels. rlaif made no human evaluation of this model's answers.

## Made with
{", ".join(f"{name} {version(name)}" for name in ("trl", "peft", "transformers", "torch"))}
"""


def _header(prepared: PreparedTraining, method: str, result: TrainResult) -> str:
    local = prepared.path != prepared.model or Path(prepared.path).exists()
    base = "" if local else f"base_model: {prepared.model}\n"  # the hub rejects a local path here
    library = "transformers" if result.merged else "peft"
    task = "text-classification" if methods.get_method(method).head == "score" else "text-generation"
    return f"{base}library_name: {library}\npipeline_tag: {task}\ntags: [trl, {method}, rlaif]\n"


def _layout(result: TrainResult) -> str:
    parts = []
    if result.adapter:
        parts.append(
            "- `adapter/`: the LoRA adapter, to be loaded on top of the base with peft or vLLM's `--lora-modules`"
        )
    if result.merged:
        parts.append(
            "- `merged/`: the complete model with tokenizer and chat template, for transformers and any server"
        )
    return "\n".join(parts) + "\n"


def _data(prepared: PreparedTraining, config: Config, result: TrainResult) -> str:
    unit = methods.get_method(config.train.method).row_unit
    if unit != "pairs":
        noun = "prompts" if config.train.method == "rloo" else unit
        return f"{result.pairs} {noun} of {prepared.train.height} preference pairs."
    dropped = prepared.train.height - result.pairs
    if not dropped:
        return f"{result.pairs} preference pairs."
    drops_overlong = methods.get_method(config.train.method).drops_overlong_pairs
    reason = "they exceed" if drops_overlong else "their prompts fill"
    return f"{result.pairs} preference pairs ({dropped} more were dropped: {reason} the maximum length)."


def _sources(frame: pl.DataFrame) -> str:
    if "label_source" not in frame.columns:
        return "not recorded"
    counts = frame["label_source"].value_counts(sort=True).iter_rows()
    return ", ".join(f"{source or 'not recorded'} {count}" for source, count in counts)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _results(result: TrainResult) -> str:
    loss = f"Final training loss {result.loss:.4f}.\n" if result.loss is not None else ""
    if result.accuracy_after is None:
        return f"{loss}Not measured: the dataset has no held-out pairs.\n"
    comparison = "chosen answer more likely per token" if result.moved else "chosen answer scored higher"
    moved = f"| moved towards the chosen answer (chance is 0.5) | {result.moved} |\n" if result.moved else ""
    return f"""{loss}
| held-out pairs, with 95 % interval | |
|---|---|
| {comparison}, before | {result.accuracy_before} |
| {comparison}, after | {result.accuracy_after} |
{moved}"""

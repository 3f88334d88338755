"""Check a preference dataset before training.

The checks read the files of RUN/dataset and render them with the chat template of the tokenizer that training will use.
A finding has the level ``pass``, ``warn`` (reported, and training continues) or ``refuse``. Every message has its
numbers. Counts over rows are exact. Checks that need the tokenizer use up to ``MAX_SAMPLED_PAIRS`` evenly spaced pairs,
and their messages say so. Nothing is written, and no model is loaded.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlaif.errors import UsageError, did_you_mean
from rlaif.train.chat_template import SIDES, common_prefix_length, to_chat_turns, token_ids

if TYPE_CHECKING:
    import polars as pl

Level = Literal["pass", "warn", "refuse"]

MIN_TRAIN_PAIRS = 100
MIN_TEST_PAIRS = 20
"""Number of held-out pairs below which a share is not meaningful."""
MAX_SAMPLED_PAIRS = 2_000
MAX_OVERLONG_FRACTION = 0.05
MAX_LONGER_FRACTION = 0.70
MIN_LENGTH_BIAS_PAIRS = 20
EXPECTED_COLUMNS = "lists of {role, content}, with only the assistant's turn in chosen and rejected"


@dataclass(frozen=True, slots=True)
class PreflightFinding:
    """Result of one check. ``message`` has the count and the total; ``hint`` is one action that would help."""

    name: str
    level: Level
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


def check_dataset(
    dataset: Path, tokenizer: Any, *, max_length: int, drops_overlong: bool = False
) -> list[PreflightFinding]:
    """Run every check of the dataset at ``dataset``: train.parquet and, if it exists, test.parquet."""
    findings, frame = check_rows(dataset)
    if frame is not None:
        findings += check_tokens(frame, tokenizer, max_length=max_length, drops_overlong=drops_overlong)[0]
    return findings


def raise_refusals(findings: Iterable[PreflightFinding], *, location: Path) -> None:
    """Raise :class:`UsageError` with every finding of level ``refuse``, if there are any."""
    refused = [finding for finding in findings if finding.level == "refuse"]
    if refused:
        hint = next((finding.hint for finding in refused if finding.hint), None)
        raise UsageError("; ".join(finding.message for finding in refused), location=str(location), hint=hint)


# Checks of the rows


def check_rows(dataset: Path) -> tuple[list[PreflightFinding], pl.DataFrame | None]:
    """Run the checks that need no tokenizer, and return their findings and the training rows.

    The rows are None if training is refused.
    """
    findings: list[PreflightFinding] = []
    frames: dict[str, pl.DataFrame] = {}
    for name in ("train", "test"):
        path = dataset / f"{name}.parquet"
        if not path.exists():
            findings.append(_missing_file(name, dataset.parent))
            continue
        frame, problems = _read_frame(path)
        if frame is None:
            findings += problems
            continue
        frames[name] = frame
        findings += _check_row_contents(frame, name, dataset.parent)
    if len(frames) == 2:
        findings += _prompt_leak(frames["train"], frames["test"])
    refused = any(finding.level == "refuse" for finding in findings)
    return findings, None if refused else frames.get("train")


def _missing_file(name: str, run: Path) -> PreflightFinding:
    if name == "test":
        return _test_set_size(0)
    return PreflightFinding("dataset", "refuse", "train.parquet does not exist yet", f"Run `rlaif judge {run}`.")


def _read_frame(path: Path) -> tuple[pl.DataFrame | None, list[PreflightFinding]]:
    """Return the rows of ``path``, or None and the findings if its columns are not as training needs them."""
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        return None, [
            PreflightFinding(
                "dataset", "refuse", f"{path.name} cannot be read: {_first_line(error)}", _rebuild_hint(path)
            )
        ]
    missing = [side for side in SIDES if side not in frame.columns]
    if missing:
        close = did_you_mean(missing[0], frame.columns)
        message = (
            f"{path.name} has no column {', '.join(missing)}; it has {', '.join(frame.columns) or 'no columns'}, "
            f"expected {', '.join(SIDES)}"
        )
        hint = close.replace("mean", "rename") if close.startswith("Did you mean") else _rebuild_hint(path)
        return None, [PreflightFinding("columns", "refuse", message, hint)]
    wrong = [f"{side} is {frame.schema[side]}" for side in SIDES if not _is_conversation(frame.schema[side])]
    if wrong:
        message = f"{path.name}: {'; '.join(wrong)}; expected {EXPECTED_COLUMNS}"
        return None, [PreflightFinding("columns", "refuse", message, _rebuild_hint(path))]
    return frame, []


def _is_conversation(dtype: pl.DataType) -> bool:
    import polars as pl

    if not isinstance(dtype, pl.List) or not isinstance(dtype.inner, pl.Struct):
        return False
    fields = {field.name: field.dtype for field in dtype.inner.fields}
    # If every content is null (turns with only tool calls), the column has the type Null.
    return fields.get("role") == pl.String and fields.get("content") in (pl.String, pl.Null)


def _check_row_contents(frame: pl.DataFrame, name: str, run: Path) -> list[PreflightFinding]:
    import polars as pl

    n = frame.height
    if n == 0:
        # Without test rows, training cannot be measured. Without training rows, nothing can be trained.
        if name == "test":
            return [_test_set_size(0)]
        return [
            PreflightFinding(
                "dataset", "refuse", "train.parquet has no rows", f"Run `rlaif status {run}`: it shows the next step."
            )
        ]
    texts = {side: _side_text(frame, side) for side in ("chosen", "rejected")}
    counts = frame.select(
        identical=texts["chosen"] == texts["rejected"],
        empty=(texts["chosen"] == "") | (texts["rejected"] == ""),
        speaker=pl.any_horizontal(
            (pl.col(side).list.first().struct.field("role") != "assistant").fill_null(False)
            for side in ("chosen", "rejected")
        ),
        prompt=(pl.col("prompt").list.len() == 0).fill_null(True),
    ).with_columns(identical=pl.col("identical") & ~pl.col("empty"))
    relabel = f"Label these pairs again with `rlaif review {run}`, or remove them if rlaif did not build the dataset."
    findings = []
    for check_name, problem in (
        ("identical", "have the same chosen and rejected answer"),
        ("empty", "have an empty chosen or rejected answer"),
        ("speaker", "have a chosen or rejected answer that does not start with a turn of the assistant"),
        ("prompt", "have no prompt"),
    ):
        bad = int(counts[check_name].sum())
        level: Level = "refuse" if bad else "pass"
        message = f"{name}: {bad} of {n} pairs {problem}"
        if bad:
            message += _pair_names(frame.filter(counts[check_name]))
        if bad and check_name == "speaker":
            message += f"; expected {EXPECTED_COLUMNS}"
        findings.append(PreflightFinding(check_name, level, message, relabel if bad else None))
    return findings + ([_train_set_size(n), _length_bias(frame)] if name == "train" else [_test_set_size(n)])


def _side_text(frame: pl.DataFrame, side: str) -> pl.Expr:
    """Return the text of a side with its tool calls, trimmed: answers that differ only in spaces teach nothing."""
    import polars as pl

    content = _content().str.strip_chars()
    dtype = frame.schema[side]
    assert isinstance(dtype, pl.List) and isinstance(dtype.inner, pl.Struct)
    if "tool_calls" in {field.name for field in dtype.inner.fields}:
        calls = pl.element().struct.field("tool_calls")
        called = calls.list.eval(pl.element().struct.json_encode()).list.join(" ")
        content = pl.concat_str(content, called.fill_null(""), separator=" ").str.strip_chars()
    return pl.col(side).list.eval(content).list.join("\n").fill_null("")


def _content() -> pl.Expr:
    import polars as pl

    return pl.element().struct.field("content").cast(pl.String).fill_null("")


def _pair_names(frame: pl.DataFrame) -> str:
    if "pair_id" not in frame.columns:
        return ""
    names = frame["pair_id"].head(3).to_list()
    return f" (pair {', '.join(map(str, names))}{', ...' if frame.height > len(names) else ''})"


def _train_set_size(n: int) -> PreflightFinding:
    if n < MIN_TRAIN_PAIRS:
        return PreflightFinding(
            "count",
            "warn",
            f"only {n} pairs: fewer than {MIN_TRAIN_PAIRS} rarely improve a model",
            "Use more prompts, or more answers per prompt.",
        )
    return PreflightFinding("count", "pass", f"{n} pairs")


def _test_set_size(n: int) -> PreflightFinding:
    if n < MIN_TEST_PAIRS:
        return PreflightFinding(
            "measured",
            "warn",
            f"{f'only {n}' if n else 'no'} pairs are held out: the effect of the training cannot be measured, and "
            "reversed labels cannot be detected",
            "Set a larger test_fraction under [pairs].",
        )
    return PreflightFinding("measured", "pass", f"{n} pairs are held out to measure the effect of the training")


def _length_bias(frame: pl.DataFrame) -> PreflightFinding:
    import polars as pl

    def characters(side: str) -> pl.Expr:
        return pl.col(side).list.eval(_content().str.len_chars()).list.sum()

    lengths = frame.select(chosen=characters("chosen"), rejected=characters("rejected"))
    n, longer = frame.height, int((lengths["chosen"] > lengths["rejected"]).sum())
    sums = lengths.sum().row(0)
    ratio = sums[0] / max(sums[1], 1)
    message = (
        f"the chosen answer is longer in {longer} of {n} pairs ({longer / n:.0%}), {ratio:.2f} times as long on average"
    )
    if n >= MIN_LENGTH_BIAS_PAIRS and longer / n > MAX_LONGER_FRACTION:
        return PreflightFinding(
            "skew",
            "warn",
            f"{message}: the model may learn length instead of quality",
            "Check the judge's length bias, or try `--loss sigmoid_norm`, which divides by length.",
        )
    return PreflightFinding("skew", "pass", message)


def _prompt_leak(train: pl.DataFrame, test: pl.DataFrame) -> list[PreflightFinding]:
    if "prompt_id" not in train.columns or "prompt_id" not in test.columns or not test.height:
        return []
    shared = set(train["prompt_id"]) & set(test["prompt_id"])
    message = f"{len(shared)} of {test['prompt_id'].n_unique()} test prompts are also in the training set"
    if shared:
        return [
            PreflightFinding("leak", "warn", f"{message}: the held-out accuracy will be too high", "Split by prompt.")
        ]
    return [PreflightFinding("leak", "pass", message)]


# Checks of the tokens


@dataclass(frozen=True, slots=True)
class _PairLengths:
    """Token counts of a pair. ``prompt_end``: the tokens of the prompt that differ once an answer follows."""

    prompt: int
    longest: int
    prompt_end: list[int]


def check_tokens(
    frame: pl.DataFrame, tokenizer: Any, *, max_length: int, drops_overlong: bool
) -> tuple[list[PreflightFinding], float]:
    """Run the checks that tokenize, and return their findings and the share of pairs that fit into ``max_length``.

    Every row of ``frame`` must have passed :func:`check_rows`. ``drops_overlong``:
    :attr:`rlaif.train.methods.base.TrainingMethod.drops_overlong_pairs`.
    """
    if not getattr(tokenizer, "chat_template", None):
        finding = PreflightFinding(
            "template",
            "refuse",
            "the tokenizer has no chat template, so conversations cannot be rendered",
            "Train an instruct model, or put a chat_template.jinja in the model's folder.",
        )
        return [finding], 0.0
    sample = frame.gather_every(-(-frame.height // MAX_SAMPLED_PAIRS))
    measured: list[_PairLengths] = []
    failures: list[str] = []
    for row in sample.iter_rows(named=True):
        try:
            measured.append(_measure_lengths(to_chat_turns(row), tokenizer))
        except Exception as error:  # a template is a program, and may raise anything
            failures.append(_first_line(error))
    n = sample.height
    of = f"{n} pairs" if n == frame.height else f"{n} sampled pairs"
    if failures:
        message = f"the chat template cannot render {len(failures)} of {of}: {failures[0]}"
        hint = "Train a model whose chat template supports these turns."
        return [PreflightFinding("template", "refuse", message, hint)], 0.0
    renders = PreflightFinding("template", "pass", f"the chat template renders all of {of}")
    dropped = sum((row.longest > max_length) if drops_overlong else (row.prompt >= max_length) for row in measured)
    lengths = _check_length(measured, of, max_length, dropped, drops_overlong=drops_overlong)
    return [renders, _check_prefix(measured, of, tokenizer), lengths], 1 - dropped / n


def _measure_lengths(row: dict[str, Any], tokenizer: Any) -> _PairLengths:
    prompt = token_ids(tokenizer, row["prompt"], row["tools"], add_generation_prompt=True)
    rendered = [token_ids(tokenizer, row["prompt"] + row[side], row["tools"]) for side in ("chosen", "rejected")]
    shared = min(common_prefix_length(prompt, answer_ids) for answer_ids in rendered)
    return _PairLengths(len(prompt), max(map(len, rendered)), prompt[shared:])


def _check_prefix(measured: list[_PairLengths], of: str, tokenizer: Any) -> PreflightFinding:
    broken = [row for row in measured if row.prompt_end]
    message = f"the rendered prompt is not a prefix of the rendered prompt with answer in {len(broken)} of {of}"
    if not broken:
        return PreflightFinding("prefix", "pass", message)
    return PreflightFinding(
        "prefix",
        "warn",
        f"{message}: training lacks this end of the prompt, which the model sees when it answers: "
        f"{tokenizer.decode(broken[0].prompt_end)!r}",
        "Use a chat template that renders a prompt the same with and without an answer.",
    )


def _check_length(
    measured: list[_PairLengths], of: str, max_length: int, dropped: int, *, drops_overlong: bool
) -> PreflightFinding:
    overlong = sum(row.longest > max_length for row in measured)
    lengths = sorted(row.longest for row in measured)
    message = (
        f"{overlong} of {of} ({overlong / len(measured):.0%}) are longer than max_length = {max_length} tokens "
        f"(median {statistics.median(lengths):.0f}, longest {lengths[-1]})"
    )
    if dropped:
        subject = "these pairs" if drops_overlong else f"{dropped} pairs, whose prompt alone fills max_length,"
        message += f"; {subject} are dropped"
    elif overlong:
        message += "; their ends are cut off"
    fits = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
    hint = f"Set max_length = {fits} under [train]: 99 % of them fit."
    if overlong == len(measured):
        return PreflightFinding("length", "refuse", message, hint)
    if overlong > MAX_OVERLONG_FRACTION * len(measured):
        return PreflightFinding("length", "warn", message, hint)
    return PreflightFinding("length", "pass", message)


def _rebuild_hint(path: Path) -> str:
    return f"Build it again with `rlaif judge {path.parent.parent}`."


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

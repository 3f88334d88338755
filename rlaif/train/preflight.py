"""What can be known about a preference dataset before any training time is spent.

Takes the files of RUN/dataset and the tokenizer that training will use, renders with its real chat template, and gives
findings: ``pass``, ``warn`` (training goes on, and the person is told), or ``refuse``. Every message carries its
numbers. Counts over rows are exact; what needs the tokenizer is taken from up to ``MAX_SAMPLED_PAIRS`` evenly spaced
pairs, and the message's n says so. Nothing is written, and no model is loaded.
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
"""Held-out pairs below which a share says nothing."""
MAX_SAMPLED_PAIRS = 2_000
MAX_OVERLONG_FRACTION = 0.05
MAX_LONGER_FRACTION = 0.70
MIN_LENGTH_BIAS_PAIRS = 20
EXPECTED_COLUMNS = "lists of {role, content}, with only the assistant's turn in chosen and rejected"


@dataclass(frozen=True, slots=True)
class PreflightFinding:
    """One check's result. ``message`` states the number and the n; ``hint`` says one thing that would help."""

    name: str
    level: Level
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


def check_dataset(
    dataset: Path, tokenizer: Any, *, max_length: int, drops_overlong: bool = False
) -> list[PreflightFinding]:
    """Every check of the dataset at ``dataset`` (train.parquet and, where it is there, test.parquet)."""
    findings, frame = check_rows(dataset)
    if frame is not None:
        findings += check_tokens(frame, tokenizer, max_length=max_length, drops_overlong=drops_overlong)[0]
    return findings


def raise_refusals(findings: Iterable[PreflightFinding], *, location: Path) -> None:
    """Raise :class:`UsageError` with every finding of level ``refuse``; do nothing where there is none."""
    refused = [finding for finding in findings if finding.level == "refuse"]
    if refused:
        hint = next((finding.hint for finding in refused if finding.hint), None)
        raise UsageError("; ".join(finding.message for finding in refused), location=str(location), hint=hint)


# The rows


def check_rows(dataset: Path) -> tuple[list[PreflightFinding], pl.DataFrame | None]:
    """The checks that need no tokenizer, and the training rows. None instead of rows where training is refused."""
    findings: list[PreflightFinding] = []
    frames: dict[str, pl.DataFrame] = {}
    for name in ("train", "test"):
        path = dataset / f"{name}.parquet"
        if not path.exists():
            if name == "train":
                findings.append(
                    PreflightFinding(
                        "dataset", "refuse", "there is no train.parquet yet", f"Run: rlaif judge {dataset.parent}"
                    )
                )
            else:
                findings.append(_test_set_size(0))
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


def _read_frame(path: Path) -> tuple[pl.DataFrame | None, list[PreflightFinding]]:
    """The rows of ``path`` if its columns are as training needs them, else None and why."""
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
            f"{path.name} lacks {', '.join(missing)}: found {', '.join(frame.columns) or 'no column'}; "
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
    # A content that is null throughout (calls only) has no type of its own.
    return fields.get("role") == pl.String and fields.get("content") in (pl.String, pl.Null)


def _check_row_contents(frame: pl.DataFrame, name: str, run: Path) -> list[PreflightFinding]:
    import polars as pl

    n = frame.height
    judge_first = f"Run: rlaif judge {run}"
    if n == 0:
        # An empty test set costs a measurement, an empty training set the training.
        if name == "test":
            return [_test_set_size(0)]
        return [PreflightFinding("dataset", "refuse", "train.parquet has no rows", judge_first)]
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
    rebuild = f"Label these pairs anew: rlaif review {run}; of a dataset that rlaif did not build, take them out."
    findings = []
    for check_name, problem in (
        ("identical", "have the same chosen and rejected answer"),
        ("empty", "have an empty chosen or rejected answer"),
        ("speaker", "have chosen or rejected beginning with another turn than the assistant's"),
        ("prompt", "have no prompt"),
    ):
        bad = int(counts[check_name].sum())
        level: Level = "refuse" if bad else "pass"
        which = _pair_names(frame.filter(counts[check_name])) if bad else ""
        which += f"; expected {EXPECTED_COLUMNS}" * (bad > 0 and check_name == "speaker")
        findings.append(
            PreflightFinding(
                check_name, level, f"{name}: {bad} of {n} pairs {problem}{which}", rebuild if bad else None
            )
        )
    return findings + ([_train_set_size(n), _length_bias(frame)] if name == "train" else [_test_set_size(n)])


def _side_text(frame: pl.DataFrame, side: str) -> pl.Expr:
    """All that a side says, ends trimmed: two answers that differ only there teach nothing."""
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
            "count", "warn", f"only {n} pairs: fewer than {MIN_TRAIN_PAIRS} rarely change a model for the better",
            "Sample more prompts or more answers a prompt.",
        )  # fmt: skip
    return PreflightFinding("count", "pass", f"{n} pairs")


def _test_set_size(n: int) -> PreflightFinding:
    if n < MIN_TEST_PAIRS:
        return PreflightFinding(
            "measured", "warn",
            f"{f'only {n}' if n else 'no'} pairs are held out: what training did cannot be measured, nor reversed "
            "labels be noticed", "A larger test_fraction under [pairs].",
        )  # fmt: skip
    return PreflightFinding("measured", "pass", f"{n} pairs are held out to measure what training did")


def _length_bias(frame: pl.DataFrame) -> PreflightFinding:
    import polars as pl

    def characters(side: str) -> pl.Expr:
        return pl.col(side).list.eval(_content().str.len_chars()).list.sum()

    lengths = frame.select(chosen=characters("chosen"), rejected=characters("rejected"))
    n, longer = frame.height, int((lengths["chosen"] > lengths["rejected"]).sum())
    sums = lengths.sum().row(0)
    ratio = sums[0] / max(sums[1], 1)
    message = (
        f"the chosen answer is the longer one in {longer} of {n} pairs ({longer / n:.0%}), "
        f"{ratio:.2f} times as long on average"
    )
    if n >= MIN_LENGTH_BIAS_PAIRS and longer / n > MAX_LONGER_FRACTION:
        return PreflightFinding(
            "skew", "warn", f"{message}: the model may learn length instead of quality",
            'Look at the judge\'s length bias, or try --loss sigmoid_norm, which divides by length.',
        )  # fmt: skip
    return PreflightFinding("skew", "pass", message)


def _prompt_leak(train: pl.DataFrame, test: pl.DataFrame) -> list[PreflightFinding]:
    if "prompt_id" not in train.columns or "prompt_id" not in test.columns or not test.height:
        return []
    shared = set(train["prompt_id"]) & set(test["prompt_id"])
    message = f"{len(shared)} of {test['prompt_id'].n_unique()} test prompts are in the training set too"
    if shared:
        return [PreflightFinding("leak", "warn", f"{message}: the held-out accuracy will flatter", "Split by prompt.")]
    return [PreflightFinding("leak", "pass", message)]


# Its tokens


@dataclass(frozen=True, slots=True)
class _PairLengths:
    prompt: int
    longest: int
    prefix: bool
    lost: list[int]


def check_tokens(
    frame: pl.DataFrame, tokenizer: Any, *, max_length: int, drops_overlong: bool
) -> tuple[list[PreflightFinding], float]:
    """The checks that render and tokenize, and the share of the pairs that max_length leaves in the training.

    Every row of ``frame`` has passed :func:`check_rows`. ``drops_overlong``:
    :attr:`rlaif.train.methods.base.TrainingMethod.drops_overlong_pairs`.
    """
    if not getattr(tokenizer, "chat_template", None):
        none = PreflightFinding(
            "template", "refuse", "the tokenizer has no chat template, so conversations cannot be rendered",
            "Train an instruct model, or put a chat_template.jinja beside the model's tokenizer.",
        )  # fmt: skip
        return [none], 0.0
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
        return [PreflightFinding("template", "refuse", message, "Train a model whose template takes these turns.")], 0.0
    renders = PreflightFinding("template", "pass", f"the chat template renders all of {of}")
    left_out = sum((row.longest > max_length) if drops_overlong else (row.prompt >= max_length) for row in measured)
    lengths = _check_length(measured, of, max_length, left_out, drops_overlong=drops_overlong)
    return [renders, _check_prefix(measured, of, tokenizer), lengths], 1 - left_out / n


def _measure_lengths(row: dict[str, Any], tokenizer: Any) -> _PairLengths:
    prompt = token_ids(tokenizer, row["prompt"], row["tools"], add_generation_prompt=True)
    rendered = [token_ids(tokenizer, row["prompt"] + row[side], row["tools"]) for side in ("chosen", "rejected")]
    shared = min(common_prefix_length(prompt, answer_ids) for answer_ids in rendered)
    return _PairLengths(len(prompt), max(map(len, rendered)), shared == len(prompt), prompt[shared:])


def _check_prefix(measured: list[_PairLengths], of: str, tokenizer: Any) -> PreflightFinding:
    broken = [row for row in measured if not row.prefix]
    message = f"the rendered prompt is not a prefix of prompt and answer in {len(broken)} of {of}"
    if not broken:
        return PreflightFinding("prefix", "pass", message)
    return PreflightFinding(
        "prefix", "warn",
        f"{message}: the model is trained without this end of the prompt, which it sees when it answers: "
        f"{tokenizer.decode(broken[0].lost)!r}",
        "Use a chat template that renders a prompt alone as it renders it before an answer.",
    )  # fmt: skip


def _check_length(
    measured: list[_PairLengths], of: str, max_length: int, left_out: int, *, drops_overlong: bool
) -> PreflightFinding:
    overlong = sum(row.longest > max_length for row in measured)
    lengths = sorted(row.longest for row in measured)
    message = (
        f"{overlong} of {of} ({overlong / len(measured):.0%}) are longer than max_length = {max_length} tokens "
        f"(median {statistics.median(lengths):.0f}, longest {lengths[-1]})"
    )
    if left_out:
        which = "they" if drops_overlong else f"{left_out} have a prompt that fills it alone and"
        message += f"; {which} are left out"
    elif overlong:
        message += "; their ends are cut off"
    fits = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
    hint = f"max_length = {fits} under [train] would hold 99 % of them."
    if overlong == len(measured):
        return PreflightFinding("length", "refuse", message, hint)
    return PreflightFinding(
        "length", *(("warn", message, hint) if overlong > MAX_OVERLONG_FRACTION * len(measured) else ("pass", message))
    )


def _rebuild_hint(path: Path) -> str:
    return f"Build it again: rlaif judge {path.parent.parent}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

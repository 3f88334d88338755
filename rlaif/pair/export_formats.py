"""Export a run's dataset in the layout that another trainer reads: trl, h4, llama-factory, axolotl, openrlhf.

``export_dataset(RUN/dataset, format, DIR)`` reads train.parquet and test.parquet in batches (a million rows are never
in memory), writes to a hidden folder inside DIR, then moves the files into place and returns them. DIR is new, empty,
or holds an export in the same format. Splits without rows are omitted. Rows that the target cannot represent are
dropped and counted, by reason, in the README.md of the export, which also says how to load it there. To add a format,
add one function and its entry in ``FORMATS``.

Files of each format (checked against the loader of each project):

trl             train.parquet, test.parquet unchanged. DPOTrainer reads prompt, chosen, rejected (lists of
                {role, content}) and tools (a JSON string). RewardTrainer reads a column *margin*, which this is not.
h4              data/{train,test}_prefs-00000-of-00001.parquet, like HuggingFaceH4/ultrafeedback_binarized: prompt (the
                first user turn, a string), prompt_id, chosen, rejected (whole conversations), messages (= chosen).
                alignment-handbook reads chosen and rejected, by ``dataset_mixture.datasets[].columns``. It has neither
                score_chosen nor score_rejected: a pair has a confidence, its answers have no scores of their own.
llama-factory   rlaif_train.jsonl, rlaif_test.jsonl: conversations [{from, value}], chosen, rejected {from, value},
                system, tools (strings, empty for none); dataset_info.json declares them with ``formatting: sharegpt``,
                ``ranking: true`` and ``columns``. Read by ``stage: dpo|rm``, ``dataset_dir``, ``dataset``,
                ``eval_dataset``. JSON Lines, because a JSON array is read at once. The turns before the answer must
                alternate between user or tool result and assistant or tool call: LLaMA-Factory drops other rows.
axolotl         train.jsonl, test.jsonl: messages (list), chosen, rejected (one {role, content}), and axolotl.yaml with
                ``rl: dpo``, ``datasets[].type: chat_template.default``, ``field_messages``, ``field_chosen``,
                ``field_rejected``. The names are axolotl's defaults, so they hold however its settings are parsed.
                Answers lose whitespace at both ends: axolotl looks for the answer in the rendered template, and a
                template that trims leaves nothing of an answer that it cannot find. It does not read tools.
openrlhf        train.jsonl, test.jsonl: chosen, rejected (whole conversations). ``--data.apply_chat_template
                --data.chosen_key chosen --data.rejected_key rejected``, no ``--data.prompt_key``. Never a column
                *margin*: its reward model trainer reads one. It does not read tools.

The JSON Lines have only columns that are text in every row: a column that starts with ten megabytes of nulls does not
load.
"""

from __future__ import annotations

import enum
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from rlaif.errors import RunError, UsageError, did_you_mean, os_error_message
from rlaif.run.atomic_write import remove_stale_temp_files

Row = dict[str, Any]
BATCH_ROWS = 1024
SPLITS = ("train", "test")
README_MARKER = "<!-- rlaif export {} -->"


class _RowProblem(enum.StrEnum):
    """Reason for which a target cannot represent a row. The value completes "... rows"."""

    NOT_ALTERNATING = "with turns that do not alternate"
    TEXT_AND_CALLS = "with text and tool calls in one turn"
    INVALID_ARGUMENTS = "with tool arguments that are not JSON"
    SEVERAL_TURNS = "with an answer of more than one turn"
    TOOL_CALLS = "with tool calls in a turn"


class _UnsupportedRowError(Exception):
    """The target cannot represent this row."""

    def __init__(self, problem: _RowProblem) -> None:
        super().__init__(problem.value)
        self.problem = problem


class _Export:
    """State of one export: the splits that have rows, the folder to write to, the counts, and the file of each split
    that ``datasets.load_dataset`` will find (``data_files``)."""

    def __init__(self, splits: dict[str, Path], build_dir: Path, output: Path) -> None:
        self.splits = splits
        self.build_dir = build_dir
        self.output = output
        self.data_files: dict[str, str] = {}
        self.rows: Counter[str] = Counter()
        self.dropped: Counter[_RowProblem] = Counter()
        self.with_tools = 0

    def iter_batches(self, split: str) -> Iterator[list[Row]]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.splits[split]) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield batch.to_pylist()

    def write_jsonl(self, name: str, convert: Callable[[Row], Row]) -> None:
        """Write every split as JSON Lines. Rows that ``convert`` rejects are dropped and counted."""
        for split in list(self.splits):
            path = self.build_dir / name.format(split)
            with path.open("wb") as file:
                for rows in self.iter_batches(split):
                    file.write(b"".join(self._json_lines(split, rows, convert)))
            if self.rows[split]:
                self.data_files[split] = path.name
            else:
                path.unlink()
                del self.splits[split]

    def _json_lines(self, split: str, rows: Sequence[Row], convert: Callable[[Row], Row]) -> Iterator[bytes]:
        for row in rows:
            try:
                line = {**convert(row), "pair_id": row["pair_id"]}
            except _UnsupportedRowError as error:
                self.dropped[error.problem] += 1
                continue
            self.rows[split] += 1
            self.with_tools += bool(row.get("tools"))
            yield orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)

    def text_if_test(self, text: str) -> str:
        return text if "test" in self.splits else ""


def export_dataset(run_dataset_dir: Path, format: str, output: Path) -> list[Path]:  # noqa: A002
    """Write the dataset in ``format`` to ``output`` and return the files.

    Raises :class:`UsageError` without a dataset, if the format is unknown or ``output`` holds other files, and
    :class:`RunError` if the disk cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown export format {format!r}", hint=did_you_mean(format, FORMATS))
    write = FORMATS[format]
    splits = _splits_with_rows(run_dataset_dir)
    _check_output_free(output, format)
    build_dir = output / f".export.{os.getpid()}"
    remove_stale_temp_files(output)
    try:
        build_dir.mkdir(parents=True)
        export = _Export(splits, build_dir, output)
        usage = write(export)
        if not export.rows["train"]:
            reasons = "; ".join(f"{count} {problem}" for problem, count in export.dropped.items())
            raise UsageError(
                f"{format} cannot represent any row of this dataset: {reasons}",
                location=str(run_dataset_dir),
                hint="Export in another format.",
            )
        (build_dir / "README.md").write_text(_readme(export, format, usage), encoding="utf-8")
        return _move_into_place(build_dir, output)
    except OSError as error:
        raise RunError(f"cannot be written: {os_error_message(error)}", location=str(output)) from None
    finally:
        shutil.rmtree(build_dir, ignore_errors=True)


# One function per format: writes its files and returns how to use them there.


def _export_trl(export: _Export) -> str:
    import pyarrow.parquet

    for split, path in export.splits.items():
        export.data_files[split] = shutil.copyfile(path, export.build_dir / path.name).name
        export.rows[split] = pyarrow.parquet.read_metadata(path).num_rows
    return f"""\
```python
from datasets import load_dataset
from trl import DPOTrainer

dataset = load_dataset({_quote(export.output)})
trainer = DPOTrainer(model, train_dataset=dataset["train"]{export.text_if_test(', eval_dataset=dataset["test"]')}, ...)
```

`RewardTrainer` reads a column named `margin` into its loss and accepts no nulls there. To use the ratings:
`dataset = dataset.rename_column("rating_margin", "margin")`.
"""


def _export_h4(export: _Export) -> str:
    import pyarrow
    import pyarrow.parquet

    (export.build_dir / "data").mkdir()
    for split, source in export.splits.items():
        source_schema = pyarrow.parquet.read_schema(source)
        turns = pyarrow.list_(_turn_type([source_schema.field(name).type for name in ("prompt", "chosen", "rejected")]))
        text_type, float_type = pyarrow.string(), pyarrow.float64()
        fields = {"prompt": text_type, "prompt_id": text_type, "chosen": turns, "rejected": turns, "messages": turns}
        fields |= {"pair_id": text_type, "label_source": text_type, "confidence": float_type}
        fields |= {"tools": text_type} if "tools" in source_schema.names else {}
        schema = pyarrow.schema(list(fields.items()))
        name = f"data/{split}_prefs-00000-of-00001.parquet"
        export.data_files[f"{split}_prefs"] = name
        with pyarrow.parquet.ParquetWriter(export.build_dir / name, schema, compression="zstd") as writer:
            for rows in export.iter_batches(split):
                writer.write_table(pyarrow.Table.from_pylist([_to_h4_row(row) for row in rows], schema=schema))
                export.rows[split] += len(rows)
    return f"""\
The layout of `HuggingFaceH4/ultrafeedback_binarized`, without its two score columns. In an alignment-handbook recipe:

```yaml
dataset_mixture:
  datasets:
    - id: {_quote(export.output)}
      split: train_prefs
      columns: [chosen, rejected]
```

Keep `columns`: TRL does not accept the string `prompt` beside whole conversations. List `test_prefs` only if you want
to train on it: the handbook concatenates all listed splits, and `test_split_size` splits by pair, not by prompt.
"""


def _to_h4_row(row: Row) -> Row:
    user_text = next((turn["content"] for turn in row["prompt"] if turn["role"] == "user"), None)
    chosen, rejected = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
    return {**row, "prompt": user_text or "", "chosen": chosen, "rejected": rejected, "messages": chosen}


def _turn_type(columns: Sequence[Any]) -> Any:
    """Return the type of one turn, with every field that a turn of these columns has."""
    import pyarrow

    fields: dict[str, Any] = {}
    for column in columns:
        for field in column.value_type.fields:
            fields.setdefault(field.name, field.with_nullable(True))
    return pyarrow.struct(list(fields.values()))


def _export_llama_factory(export: _Export) -> str:
    export.write_jsonl("rlaif_{}.jsonl", _to_llama_factory_row)
    columns = {"messages": "conversations", **{name: name for name in ("chosen", "rejected", "system", "tools")}}
    entry = {"formatting": "sharegpt", "ranking": True, "columns": columns}
    declared = {f"rlaif_{split}": {"file_name": name, **entry} for split, name in export.data_files.items()}
    text = orjson.dumps(declared, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    (export.build_dir / "dataset_info.json").write_bytes(text)
    evaluation = export.text_if_test("\neval_dataset: rlaif_test")
    return f"""\
In the training YAML (`template` is your model's):

```yaml
stage: dpo            # or rm
dataset_dir: {_quote(export.output)}
dataset: rlaif_train{evaluation}
```

Or copy the `.jsonl` files to LLaMA-Factory's `data/`, and the entries of `dataset_info.json` to the one there.
"""


def _to_llama_factory_row(row: Row) -> Row:
    turns = [_to_sharegpt_turn(turn) for turn in row["prompt"]]
    system = turns.pop(0)["value"] if turns[0]["from"] == "system" else ""
    expected_roles = (("human", "observation"), ("gpt", "function_call"))
    if len(turns) % 2 == 0 or any(turn["from"] not in expected_roles[index % 2] for index, turn in enumerate(turns)):
        raise _UnsupportedRowError(_RowProblem.NOT_ALTERNATING)
    return {
        "conversations": turns,
        "chosen": _to_sharegpt_turn(_single_turn(row["chosen"])),
        "rejected": _to_sharegpt_turn(_single_turn(row["rejected"])),
        "system": system,
        "tools": row.get("tools") or "",
    }


def _to_sharegpt_turn(turn: Row) -> Row:
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    if not turn.get("tool_calls"):
        return {"from": names[turn["role"]], "value": turn["content"] or ""}
    if turn.get("content"):
        raise _UnsupportedRowError(_RowProblem.TEXT_AND_CALLS)
    calls = [call.get("function", call) for call in turn["tool_calls"]]
    functions = [{"name": call["name"], "arguments": _parse_arguments(call["arguments"])} for call in calls]
    return {"from": "function_call", "value": orjson.dumps(functions).decode()}


def _parse_arguments(arguments: Any) -> Any:
    try:
        return orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        raise _UnsupportedRowError(_RowProblem.INVALID_ARGUMENTS) from None


def _export_axolotl(export: _Export) -> str:
    export.write_jsonl("{}.jsonl", _to_axolotl_row)
    entry = """\
  - path: {path}
    ds_type: json
    split: train
    type: chat_template.default
    field_messages: messages
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings: {{role: role, content: content}}
    roles: {{user: [user], assistant: [assistant], system: [system], tool: [tool]}}
"""
    datasets = {"train": "datasets", "test": "test_datasets"}
    yaml = "rl: dpo\nchat_template: tokenizer_default\nval_set_size: 0\n"
    for split, name in export.data_files.items():
        yaml += f"{datasets[split]}:\n" + entry.format(path=_quote(export.output.resolve() / name))
    (export.build_dir / "axolotl.yaml").write_text(yaml, encoding="utf-8")
    return """\
Copy the contents of `axolotl.yaml` into your config (`base_model`, `adapter`, `sequence_len` and the rest are yours). A
local file always has one split, named `train`.

Whitespace at both ends of the answers is removed, because axolotl finds an answer in the rendered template by its text.
For the same reason, check `axolotl preprocess --debug` if answers are a word or a digit: one that also occurs earlier
in the template (`user`, `1`) is cut in the wrong place.
"""


def _to_axolotl_row(row: Row) -> Row:
    answers = {name: _plain_turn(_single_turn(row[name])) for name in ("chosen", "rejected")}
    answers = {name: {**turn, "content": turn["content"].strip()} for name, turn in answers.items()}
    return {"messages": [_plain_turn(turn) for turn in row["prompt"]], **answers}


def _export_openrlhf(export: _Export) -> str:
    export.write_jsonl("{}.jsonl", _to_openrlhf_row)
    train, test = (shlex.quote(str(export.output / f"{split}.jsonl")) for split in SPLITS)
    evaluation = export.text_if_test(f" \\\n  --eval.dataset {test} --eval.split train")
    return f"""\
```sh
deepspeed --module openrlhf.cli.train_dpo \\
  --data.dataset {train} \\
  --data.apply_chat_template --data.chosen_key chosen --data.rejected_key rejected{evaluation}
```

Use the same flags for `openrlhf.cli.train_rm`. Do not set `--data.prompt_key`: the conversations are complete. A local
file always has one split, named `train`, so the evaluation needs `--eval.split train`. Before 0.10.2, the flags have no
`data.` prefix, and the evaluation flags are `--eval_dataset` and `--eval_split`.
"""


def _to_openrlhf_row(row: Row) -> Row:
    return {name: [_plain_turn(turn) for turn in row["prompt"] + row[name]] for name in ("chosen", "rejected")}


# Shared by the formats


def _single_turn(answer: list[Row]) -> Row:
    if len(answer) != 1:
        raise _UnsupportedRowError(_RowProblem.SEVERAL_TURNS)
    return answer[0]


def _plain_turn(turn: Row) -> Row:
    if turn.get("tool_calls") or turn["content"] is None:
        raise _UnsupportedRowError(_RowProblem.TOOL_CALLS)
    return {"role": turn["role"], "content": turn["content"]}


def _splits_with_rows(directory: Path) -> dict[str, Path]:
    import pyarrow
    import pyarrow.parquet

    splits = {split: directory / f"{split}.parquet" for split in SPLITS}
    for split, path in list(splits.items()):
        try:
            if not path.exists() or not pyarrow.parquet.read_metadata(path).num_rows:
                del splits[split]
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UsageError(
                f"cannot be read as Parquet: {error}",
                location=str(path),
                hint=f"Run `rlaif judge {directory.parent}` to rebuild it.",
            ) from None
    if "train" not in splits:
        hint = f"`rlaif status {directory.parent}` shows what the run needs."
        raise UsageError("the run has no dataset yet, or one without rows", location=str(directory), hint=hint)
    return splits


def _check_output_free(output: Path, name: str) -> None:
    """Raise :class:`UsageError` if ``output`` holds other files: a loader would read them together with the export."""
    hint = "Use `--output` with a new directory."
    if output.exists() and not output.is_dir():
        raise UsageError("the output is a file, not a directory", location=str(output), hint=hint)
    if not output.exists() or all(entry.name.startswith(".export.") for entry in output.iterdir()):
        return
    readme = output / "README.md"
    if not readme.is_file() or README_MARKER.format(name) not in readme.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(f"the directory holds files other than an export as {name}", location=str(output), hint=hint)


def _move_into_place(building: Path, output: Path) -> list[Path]:
    # README.md first: it marks the directory as this export's, even if moving the others is interrupted.
    built = sorted((path for path in building.rglob("*") if path.is_file()), key=lambda path: path.name != "README.md")
    targets = [output / path.relative_to(building) for path in built]
    for path, target in zip(built, targets, strict=True):
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
        # An earlier export may have had a test split that this one does not have.
        if (other_split := target.with_name(target.name.replace("train", "test"))) not in targets:
            other_split.unlink(missing_ok=True)
    return sorted(targets)


def _readme(export: _Export, name: str, usage: str) -> str:
    """Return the README: its YAML header lists the splits for ``datasets.load_dataset(DIR)``."""
    lists = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in export.data_files.items())
    counts = ", ".join(f"{export.rows[split]} {split}" for split in export.splits)
    notes = "".join(f"- Dropped: {count} rows {problem}.\n" for problem, count in sorted(export.dropped.items()))
    if export.with_tools and name in ("axolotl", "openrlhf"):
        notes += f"- {export.with_tools} rows have tools, which {name} does not add to the prompt.\n"
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{lists}---\n{README_MARKER.format(name)}\n"
        f"# Preference pairs for {name}\n\n{counts} rows.\n\n{notes}\n{usage}"
    )


def _quote(path: Path) -> str:
    """Quote a path as a string that is valid in YAML and Python."""
    return orjson.dumps(str(path)).decode()


FORMATS: dict[str, Callable[[_Export], str]] = {
    "trl": _export_trl,
    "h4": _export_h4,
    "llama-factory": _export_llama_factory,
    "axolotl": _export_axolotl,
    "openrlhf": _export_openrlhf,
}
"""Each format's function, which writes its files and returns how to use them there."""

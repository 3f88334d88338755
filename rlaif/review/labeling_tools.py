"""The queue as the records of two labelling tools, and their exports read back.

Argilla 2 (``--format argilla``): a JSON list of records as ``dataset.records.from_json`` reads and ``to_json`` writes
them, the pair's id as the record's, and beside it ``NAME.settings.json`` for ``rg.Settings.from_json``.

Label Studio (``--format label-studio``): a JSON list of tasks for its stock Pairwise template (``prompt``, ``answer1``,
``answer2``) plus the pair's id, and beside it ``NAME.config.xml``, the template with a choice for a tie and for both
bad and a comment. Read back: the JSON export (not JSON_MIN). A task that was skipped there is a skip.

Contract: as for CSV. Texts come back exactly (NUL, which their databases refuse, travels as its picture), and a record
that is not readable comes as an :class:`InputError` in its place. Several people's answers to one record count where
they are one choice; where they differ, the record is bad, as one file is one annotator's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from rlaif.errors import InputError
from rlaif.records import Choice
from rlaif.review.file_readers import COLUMNS, ReviewRow
from rlaif.review.queue import ReviewItem

Tool = Literal["argilla", "label-studio"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
COMPANIONS: Mapping[Tool, str] = {"argilla": ".settings.json", "label-studio": ".config.xml"}
NUL, NUL_PICTURE = "\0", "\u2400"
CHOICE_TITLES = {
    "left": "Left is better",
    "right": "Right is better",
    "tie": "Tie",
    "both_bad": "Both bad",
    "skip": "Skip",
}

LABEL_STUDIO = """<View className="root">
  <View className="prompt"><Text name="prompt" value="$prompt"/></View>
  <View className="container">
    <Pairwise name="comparison" toName="answer1,answer2"/>
    <Text name="answer1" value="$answer1"/>
    <Text name="answer2" value="$answer2"/>
  </View>
  <Choices name="neither" toName="prompt" choice="single" showInline="true">
    <Choice value="tie"/>
    <Choice value="both_bad"/>
  </Choices>
  <TextArea name="comment" toName="prompt" rows="2" maxSubmissions="1" placeholder="Comment"/>
</View>
"""


def export_records(tool: Tool, items: Iterable[ReviewItem]) -> tuple[bytes, bytes]:
    """The file and its companion. One record a line."""
    record = _argilla_record if tool == "argilla" else _label_studio_task
    lines = b",\n".join(orjson.dumps(record(item)) for item in items)
    companion = orjson.dumps(_argilla_settings()) if tool == "argilla" else LABEL_STUDIO.encode()
    return b"[\n" + lines + b"\n]\n", companion


def _argilla_record(item: ReviewItem) -> dict[str, Any]:
    fields = {"prompt": item.prompt, "left": item.left, "right": item.right}
    return {"id": item.pair_id, "fields": {name: _replace_nul(text) for name, text in fields.items()}, "metadata": {},
            "suggestions": {}, "responses": {}, "vectors": {}}  # fmt: skip


def _label_studio_task(item: ReviewItem) -> dict[str, Any]:
    texts = {"prompt": item.prompt, "answer1": item.left, "answer2": item.right}
    return {"data": {"pair_id": item.pair_id, **{name: _replace_nul(text) for name, text in texts.items()}}}


def _argilla_settings() -> dict[str, Any]:
    def entry(name: str, kind: dict[str, Any], *, required: bool) -> dict[str, Any]:
        return {"name": name, "title": name.capitalize(), "required": required, "settings": kind}

    text = {"type": "text", "use_markdown": True}
    options = [{"value": value, "text": title} for value, title in CHOICE_TITLES.items()]
    return {
        "guidelines": "Which answer is better? Neither model nor verdict is shown.",
        "fields": [entry(name, text, required=name == "prompt") for name in ("prompt", "left", "right")],
        "questions": [
            entry("choice", {"type": "label_selection", "options": options}, required=True),
            entry("comment", {"type": "text", "use_markdown": False}, required=False),
        ],
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
    }


def _replace_nul(text: str) -> str:
    return text.replace(NUL, NUL_PICTURE)


class ToolExportReader:
    """The records of a tool's JSON export, as rows."""

    ignored_columns: tuple[str, ...] = ()
    unit = "record"

    def __init__(self, path: Path, tool: Tool, records: list[Any]) -> None:
        self.path = path
        self.tool = tool
        self._records = records
        self._parse_record: Callable[[Any], dict[str, str]] = _from_argilla if tool == "argilla" else _from_label_studio

    def location(self, record_number: int) -> str:
        return f"{self.path}: record {record_number}"

    def cell_equals(self, cell: str, text: str) -> bool:
        return cell in (text, _replace_nul(text))

    def candidate_pair_ids(self) -> set[str]:
        return {row.cells["pair_id"] for row in self.rows(()) if isinstance(row, ReviewRow)}

    def rows(self, known_pair_ids: Collection[str]) -> Iterator[ReviewRow | InputError]:  # noqa: ARG002
        for record_number, record in enumerate(self._records, 1):
            try:
                yield ReviewRow(record_number, dict.fromkeys(COLUMNS, "") | self._parse_record(record))
            except _RecordError as error:
                yield InputError(error.message, location=self.location(record_number), hint=error.hint)

    def reject(self, line: int) -> None:
        """A bad record holds no other."""


class _RecordError(Exception):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def open_tool_export(path: Path, data: bytes) -> ToolExportReader:
    """The export in ``data``, of whichever tool it is. Raises :class:`InputError` where it is of neither."""
    try:
        records = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        line = data.count(b"\n", 0, error.pos) + 1
        raise InputError(
            f"not JSON: {error}", location=f"{path}:{line}", hint="Export it from the tool again."
        ) from None
    if not isinstance(records, list) or not records:
        raise InputError("not a list of records", location=str(path), hint="Export it from the tool again, as JSON.")
    first = next((record for record in records if isinstance(record, dict)), {})
    if isinstance(first.get("fields"), dict):
        return ToolExportReader(path, "argilla", records)
    if isinstance(first.get("data"), dict):
        return ToolExportReader(path, "label-studio", records)
    raise InputError(
        f"neither Argilla's records nor Label Studio's tasks; found: {', '.join(map(str, first)) or 'nothing'}",
        location=str(path),
        hint="Argilla: dataset.records.to_json(FILE). Label Studio: export as JSON, not JSON_MIN.",
    )


def _from_argilla(record: Any) -> dict[str, str]:
    fields = _field(record, "fields", dict)
    responses = record.get("responses") or {}
    if not isinstance(responses, dict):
        raise _RecordError("responses is no object", "Export it from the tool again.")
    values = {name: [_answer_value(answer) for answer in responses.get(name) or []] for name in ("choice", "comment")}
    return {
        "pair_id": _text_field(record, "id"),
        **{name: _text_field(fields, name) for name in ("prompt", "left", "right")},
        "choice": _single_choice(values["choice"]),
        "comment": "\n".join(filter(None, values["comment"])),
    }


def _answer_value(answer: Any) -> str:
    value = answer.get("value") if isinstance(answer, dict) else answer
    if value is not None and not isinstance(value, str):
        raise _RecordError(f"an answer is {value!r}, not text", "Answer the questions choice and comment only.")
    return value or ""


def _from_label_studio(task: Any) -> dict[str, str]:
    data = _field(task, "data", dict)
    choices, comments = [], []
    for annotation in task.get("annotations") or []:
        if not isinstance(annotation, dict):
            raise _RecordError("an annotation is no object", "Export it from the tool again, as JSON.")
        choice, comment = _parse_annotation(annotation)
        choices.append(choice)
        comments.append(comment)
    return {
        "pair_id": _text_field(data, "pair_id"),
        "prompt": _text_field(data, "prompt"),
        "left": _text_field(data, "answer1"),
        "right": _text_field(data, "answer2"),
        "choice": _single_choice(choices),
        "comment": "\n".join(filter(None, comments)),
    }


def _parse_annotation(annotation: dict[str, Any]) -> tuple[str, str]:
    """The choice and the comment of one annotation. A side and a tie at once is no choice: both are told."""
    if annotation.get("was_cancelled"):
        return "skip", ""
    choices: list[str] = []
    comments: list[str] = []
    for region in annotation.get("result") or []:
        value = region.get("value") if isinstance(region, dict) else None
        if not isinstance(value, dict):
            raise _RecordError("a region has no value", "Export it from the tool again, as JSON.")
        if "selected" in value:
            choices.append(str(value["selected"]))
        choices += map(str, value.get("choices") or [])
        texts = value.get("text") or []
        comments += [texts] if isinstance(texts, str) else map(str, texts)
    return " and ".join(choices), "\n".join(comments)


def _single_choice(choices: list[str]) -> str:
    distinct = sorted({choice for choice in choices if choice})
    if len(distinct) > 1:
        raise _RecordError(f"{len(choices)} people chose differently: {', '.join(distinct)}",
                          "One file is one person's: export a queue for each --annotator.")  # fmt: skip
    return distinct[0] if distinct else ""


def _field(record: Any, name: str, kind: type) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get(name), kind):
        raise _RecordError(f"the record has no {name}", "Export it from the tool again.")
    return record[name]


def _text_field(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, "" if name in ("left", "right", "answer1", "answer2") else None)
    if not isinstance(value, str):
        raise _RecordError(f"{name} is {value!r}, not text", "Export it from the tool again.")
    return value


assert set(CHOICE_TITLES) == set(get_args(Choice))

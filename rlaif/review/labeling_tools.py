"""Write the review queue as records of Argilla or Label Studio, and read their exports.

Argilla 2 (``--format argilla``): a JSON list of records in the format of ``dataset.records.from_json`` and ``to_json``,
with the pair's id as the record's id, and next to it ``NAME.settings.json`` for ``rg.Settings.from_json``.

Label Studio (``--format label-studio``): a JSON list of tasks for its stock Pairwise template (``prompt``, ``answer1``,
``answer2``) plus the pair's id, and next to it ``NAME.config.xml``: the template plus choices for a tie and for both
bad, and a comment. The import reads the JSON export (not JSON_MIN). A skipped task is a skip.

Contract: as for CSV. Texts return exactly (NUL, which the tools' databases reject, is replaced by its picture), and an
unreadable record is yielded as an :class:`UnreadableRow` in its place. Answers of several users to one record count if
they agree. If they differ, the record is bad, because a file belongs to one annotator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from rlaif.errors import InputError
from rlaif.records import Choice
from rlaif.review.file_readers import COLUMNS, ReviewRow, UnreadableRow
from rlaif.review.queue import ReviewItem

Tool = Literal["argilla", "label-studio"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
COMPANIONS: Mapping[Tool, str] = {"argilla": ".settings.json", "label-studio": ".config.xml"}
NUL, NUL_PICTURE = "\0", "\u2400"
EXPORT_AGAIN = "Export the file from the tool again, as JSON."
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
    """Return the file, with one record per line, and its companion file."""
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
        "guidelines": "Which answer is better? Models and verdicts are hidden.",
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

    def rows(self, known_pair_ids: Collection[str]) -> Iterator[ReviewRow | UnreadableRow]:  # noqa: ARG002
        for record_number, record in enumerate(self._records, 1):
            try:
                yield ReviewRow(record_number, dict.fromkeys(COLUMNS, "") | self._parse_record(record))
            except _RecordError as error:
                location = self.location(record_number)
                yield UnreadableRow(record_number, InputError(error.message, location=location, hint=error.hint))

    def reject(self, line: int) -> None:
        """Do nothing: a bad record contains no other."""


class _RecordError(Exception):
    """A record that cannot be read. The reader adds the location."""

    def __init__(self, message: str, hint: str = EXPORT_AGAIN) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def open_tool_export(path: Path, data: bytes) -> ToolExportReader:
    """Read the export in ``data``, of either tool. Raises :class:`InputError` if it is from neither."""
    try:
        records = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        line = data.count(b"\n", 0, error.pos) + 1
        raise InputError(f"not JSON: {error}", location=f"{path}:{line}", hint=EXPORT_AGAIN) from None
    if not isinstance(records, list) or not records:
        raise InputError("not a list of records", location=str(path), hint=EXPORT_AGAIN)
    first = next((record for record in records if isinstance(record, dict)), {})
    if isinstance(first.get("fields"), dict):
        return ToolExportReader(path, "argilla", records)
    if isinstance(first.get("data"), dict):
        return ToolExportReader(path, "label-studio", records)
    raise InputError(
        f"neither Argilla records nor Label Studio tasks; found fields: {', '.join(map(str, first)) or 'none'}",
        location=str(path),
        hint="Export with dataset.records.to_json(FILE) in Argilla, or as JSON (not JSON_MIN) in Label Studio.",
    )


def _from_argilla(record: Any) -> dict[str, str]:
    fields = _field(record, "fields", dict)
    responses = record.get("responses") or {}
    if not isinstance(responses, dict):
        raise _RecordError("responses is not an object")
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
        raise _RecordError(f"an answer must be text, got {value!r}", "Answer only the questions choice and comment.")
    return value or ""


def _from_label_studio(task: Any) -> dict[str, str]:
    data = _field(task, "data", dict)
    choices, comments = [], []
    for annotation in task.get("annotations") or []:
        if not isinstance(annotation, dict):
            raise _RecordError("an annotation is not an object")
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
    """Return the choice and the comment of one annotation.

    A side together with a tie is not a valid choice: both are returned, so that the error names them."""
    if annotation.get("was_cancelled"):
        return "skip", ""
    choices: list[str] = []
    comments: list[str] = []
    for region in annotation.get("result") or []:
        value = region.get("value") if isinstance(region, dict) else None
        if not isinstance(value, dict):
            raise _RecordError("a region has no value")
        if "selected" in value:
            choices.append(str(value["selected"]))
        choices += map(str, value.get("choices") or [])
        texts = value.get("text") or []
        comments += [texts] if isinstance(texts, str) else map(str, texts)
    return " and ".join(choices), "\n".join(comments)


def _single_choice(choices: list[str]) -> str:
    distinct = sorted({choice for choice in choices if choice})
    if len(distinct) > 1:
        raise _RecordError(
            f"annotators chose differently: {', '.join(distinct)}",
            "Export a queue per --annotator: a file belongs to one annotator.",
        )
    return distinct[0] if distinct else ""


def _field(record: Any, name: str, kind: type) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get(name), kind):
        raise _RecordError(f"the record has no {name}")
    return record[name]


def _text_field(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, "" if name in ("left", "right", "answer1", "answer2") else None)
    if not isinstance(value, str):
        raise _RecordError(f"{name} must be text, got {value!r}")
    return value


assert set(CHOICE_TITLES) == set(get_args(Choice))

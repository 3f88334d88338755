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
from rlaif.review.queue import Item
from rlaif.review.sheets import COLUMNS, Row

Tool = Literal["argilla", "label-studio"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
COMPANIONS: Mapping[Tool, str] = {"argilla": ".settings.json", "label-studio": ".config.xml"}
NUL, NUL_PICTURE = "\0", "\u2400"
TITLES = {"left": "Left is better", "right": "Right is better", "tie": "Tie", "both_bad": "Both bad", "skip": "Skip"}

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


def written(tool: Tool, items: Iterable[Item]) -> tuple[bytes, bytes]:
    """The file and its companion. One record a line."""
    record = _argilla_record if tool == "argilla" else _label_studio_task
    lines = b",\n".join(orjson.dumps(record(item)) for item in items)
    companion = orjson.dumps(_argilla_settings()) if tool == "argilla" else LABEL_STUDIO.encode()
    return b"[\n" + lines + b"\n]\n", companion


def _argilla_record(item: Item) -> dict[str, Any]:
    fields = {"prompt": item.prompt, "left": item.left, "right": item.right}
    return {"id": item.pair_id, "fields": {name: _stored(text) for name, text in fields.items()}, "metadata": {},
            "suggestions": {}, "responses": {}, "vectors": {}}  # fmt: skip


def _label_studio_task(item: Item) -> dict[str, Any]:
    texts = {"prompt": item.prompt, "answer1": item.left, "answer2": item.right}
    return {"data": {"pair_id": item.pair_id, **{name: _stored(text) for name, text in texts.items()}}}


def _argilla_settings() -> dict[str, Any]:
    def part(name: str, kind: dict[str, Any], *, required: bool) -> dict[str, Any]:
        return {"name": name, "title": name.capitalize(), "required": required, "settings": kind}

    text = {"type": "text", "use_markdown": True}
    options = [{"value": value, "text": title} for value, title in TITLES.items()]
    return {
        "guidelines": "Which answer is better? Neither model nor verdict is shown.",
        "fields": [part(name, text, required=name == "prompt") for name in ("prompt", "left", "right")],
        "questions": [
            part("choice", {"type": "label_selection", "options": options}, required=True),
            part("comment", {"type": "text", "use_markdown": False}, required=False),
        ],
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
    }


def _stored(text: str) -> str:
    return text.replace(NUL, NUL_PICTURE)


class ToolSheet:
    """The records of a tool's JSON export, as rows."""

    ignored: tuple[str, ...] = ()
    unit = "record"

    def __init__(self, path: Path, tool: Tool, records: list[Any]) -> None:
        self.path = path
        self.tool = tool
        self._records = records
        self._read: Callable[[Any], dict[str, str]] = _from_argilla if tool == "argilla" else _from_label_studio

    def where(self, number: int) -> str:
        return f"{self.path}: record {number}"

    def same(self, cell: str, shown: str) -> bool:
        return cell in (shown, _stored(shown))

    def candidates(self) -> set[str]:
        return {row.cells["pair_id"] for row in self.rows(()) if isinstance(row, Row)}

    def rows(self, known: Collection[str]) -> Iterator[Row | InputError]:  # noqa: ARG002
        for number, record in enumerate(self._records, 1):
            try:
                yield Row(number, dict.fromkeys(COLUMNS, "") | self._read(record))
            except _Unreadable as bad:
                yield InputError(bad.what, where=self.where(number), mend=bad.mend)

    def reject(self, line: int) -> None:
        """A bad record holds no other."""


class _Unreadable(Exception):
    def __init__(self, what: str, mend: str) -> None:
        super().__init__(what)
        self.what, self.mend = what, mend


def read_tool_sheet(path: Path, data: bytes) -> ToolSheet:
    """The export in ``data``, of whichever tool it is. Raises :class:`InputError` where it is of neither."""
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        line = data.count(b"\n", 0, error.pos) + 1
        raise InputError(f"not JSON: {error}", where=f"{path}:{line}", mend="Export it from the tool again.") from None
    if not isinstance(found, list) or not found:
        raise InputError("not a list of records", where=str(path), mend="Export it from the tool again, as JSON.")
    first = next((record for record in found if isinstance(record, dict)), {})
    if isinstance(first.get("fields"), dict):
        return ToolSheet(path, "argilla", found)
    if isinstance(first.get("data"), dict):
        return ToolSheet(path, "label-studio", found)
    raise InputError(
        f"neither Argilla's records nor Label Studio's tasks; found: {', '.join(map(str, first)) or 'nothing'}",
        where=str(path),
        mend="Argilla: dataset.records.to_json(FILE). Label Studio: export as JSON, not JSON_MIN.",
    )


def _from_argilla(record: Any) -> dict[str, str]:
    fields = _part(record, "fields", dict)
    responses = record.get("responses") or {}
    if not isinstance(responses, dict):
        raise _Unreadable("responses is no object", "Export it from the tool again.")
    values = {name: [_word(answer) for answer in responses.get(name) or []] for name in ("choice", "comment")}
    return {"pair_id": _text(record, "id"), **{name: _text(fields, name) for name in ("prompt", "left", "right")},
            "choice": _one(values["choice"]), "comment": "\n".join(filter(None, values["comment"]))}  # fmt: skip


def _word(answer: Any) -> str:
    value = answer.get("value") if isinstance(answer, dict) else answer
    if value is not None and not isinstance(value, str):
        raise _Unreadable(f"an answer is {value!r}, not text", "Answer the questions choice and comment only.")
    return value or ""


def _from_label_studio(task: Any) -> dict[str, str]:
    data = _part(task, "data", dict)
    choices, comments = [], []
    for annotation in task.get("annotations") or []:
        if not isinstance(annotation, dict):
            raise _Unreadable("an annotation is no object", "Export it from the tool again, as JSON.")
        choice, comment = _annotation(annotation)
        choices.append(choice)
        comments.append(comment)
    return {
        "pair_id": _text(data, "pair_id"),
        "prompt": _text(data, "prompt"),
        "left": _text(data, "answer1"),
        "right": _text(data, "answer2"),
        "choice": _one(choices),
        "comment": "\n".join(filter(None, comments)),
    }


def _annotation(annotation: dict[str, Any]) -> tuple[str, str]:
    """The choice and the comment of one annotation. A side and a tie at once is no choice: both are told."""
    if annotation.get("was_cancelled"):
        return "skip", ""
    said: list[str] = []
    comments: list[str] = []
    for region in annotation.get("result") or []:
        value = region.get("value") if isinstance(region, dict) else None
        if not isinstance(value, dict):
            raise _Unreadable("a region has no value", "Export it from the tool again, as JSON.")
        if "selected" in value:
            said.append(str(value["selected"]))
        said += map(str, value.get("choices") or [])
        texts = value.get("text") or []
        comments += [texts] if isinstance(texts, str) else map(str, texts)
    return " and ".join(said), "\n".join(comments)


def _one(choices: list[str]) -> str:
    given = sorted({choice for choice in choices if choice})
    if len(given) > 1:
        raise _Unreadable(f"{len(choices)} people chose differently: {', '.join(given)}",
                          "One file is one person's: export a queue for each --annotator.")  # fmt: skip
    return given[0] if given else ""


def _part(record: Any, name: str, kind: type) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get(name), kind):
        raise _Unreadable(f"the record has no {name}", "Export it from the tool again.")
    return record[name]


def _text(of: Mapping[str, Any], name: str) -> str:
    value = of.get(name, "" if name in ("left", "right", "answer1", "answer2") else None)
    if not isinstance(value, str):
        raise _Unreadable(f"{name} is {value!r}, not text", "Export it from the tool again.")
    return value


assert set(TITLES) == set(get_args(Choice))

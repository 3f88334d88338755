"""Each room of bad input: how a case is given to the product, and what it says. Used by the test, and by
``python -m tests.bad.rooms``, which writes what is said now into corpus.jsonl, to be read by a person before it is
committed: every line must say what is wrong, where, and name the line."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

from rlaif.config import ClientConfig
from rlaif.errors import RlaifError
from rlaif.generate import read as reading
from rlaif.judge import definition
from rlaif.llm.budget import Meter
from rlaif.llm.client import Client, RequestFailed
from rlaif.records import ImportRow, PromptRow
from rlaif.review import exchange
from rlaif.run.directory import Run
from rlaif.settings import load
from tests.scripted import Fault, ScriptedServer

CORPUS = Path(__file__).parent / "corpus.jsonl"


def cases() -> list[dict[str, Any]]:
    """{"room", "name" (of the file), "text", "told"} each; text is latin-1 for bytes where "bytes" is set."""
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]


def said(case: dict[str, Any], folder: Path, queue: Run | None) -> str:
    """What the product says of ``case``, with its folder written as DIR. "accepted" where it says nothing."""
    try:
        _give(case, folder, queue)
    except (RlaifError, RequestFailed) as error:
        return _plain(str(error).replace(str(folder), "DIR"))
    return "accepted"


def _plain(told: str) -> str:
    """Without lists that grow with the product, and without ids."""
    told = re.sub(r"There is: [^.]*\.", "There is: ...", told)
    told = re.sub(r"expected: [a-z_, ]*", "expected: ...", told)
    return re.sub(r"\b[0-9a-f]{16}\b", "ID", told)


def _give(case: dict[str, Any], folder: Path, queue: Run | None) -> None:
    text = case["text"]
    if case["room"] == "replies":
        _ask(text)
        return
    path = folder / case["name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if case["room"] == "reviews":
        assert queue
        text = _filled(text, queue, folder)
    path.write_bytes(text.encode("latin-1") if case.get("bytes") else text.encode("utf-8", "surrogatepass"))
    match case["room"]:
        case "prompts":
            reading.check(str(path), PromptRow, "stop", lambda line: None)
        case "imports":
            reading.check(str(path), ImportRow, "stop", lambda line: None)
        case "settings":
            load(path.parent, {}, {})
        case "judges":
            (path.parent / "prompt.md").write_text(case.get("prompt", PROMPT))
            definition.load(path.parent)
        case "reviews":
            assert queue
            exchange.import_reviews(queue, path, annotator="ann", seed=0)


PROMPT = "# System\nRules.\n# User\n{conversation}\n{reference}\n{response_a}\n{response_b}\n{reply}\n"


def _filled(text: str, queue: Run, folder: Path) -> str:
    """PAIR0, LEFT0, RIGHT0, PROMPT0 ... stand for what the queue holds."""
    import csv

    sheet = folder / "queue.csv"
    exchange.export_queue(queue, sheet, format="csv", annotator="ann", seed=0)
    with sheet.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            for name, column in (("PAIR", "pair_id"), ("LEFT", "left"), ("RIGHT", "right"), ("PROMPT", "prompt")):
                text = text.replace(f"{name}{number}", row[column])
    return text


def _ask(reply: dict[str, Any]) -> None:
    fault = Fault(reply.get("status", 200), reply.get("headers", {"Content-Type": "application/json"}),
                  reply.get("body", "").encode("latin-1"))  # fmt: skip

    async def main(url: str) -> None:
        async with Client("m", [url], ClientConfig(attempts=1), Meter(), key="sk-secret") as client:
            await client.chat({"messages": [{"role": "user", "content": "hello"}]})

    with ScriptedServer(lambda body: fault) as server:
        try:
            asyncio.run(main(server.url))
        except RlaifError as error:
            if error.where:
                error.where = error.where.replace(str(server.port), "PORT")
            raise


def main() -> None:
    import tempfile

    from tests.bad.test_bad_input import make_queue

    with tempfile.TemporaryDirectory() as place:
        queue = make_queue(Path(place) / "queue")
        lines = []
        for number, case in enumerate(cases()):
            folder = Path(place) / str(number)
            folder.mkdir()
            lines.append(json.dumps({**case, "told": said(case, folder, queue)}, ensure_ascii=True) + "\n")
            sys.stdout.write(f"{case['room']:<9}{str(case['text'])[:70]!r}\n    {json.loads(lines[-1])['told']}\n")
    CORPUS.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

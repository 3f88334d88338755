"""Cases of bad input, and the error text that rlaif gives for each.

``python -m tests.bad.cases`` writes the current texts into corpus.jsonl. Read them before you commit: every text must
say what is wrong, and name the file and the line.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

from rlaif.config.loader import load
from rlaif.config.models import ClientConfig
from rlaif.errors import RlaifError
from rlaif.generate import sources
from rlaif.judge import judge_file
from rlaif.llm.client import Client
from rlaif.llm.request import RequestFailedError
from rlaif.llm.usage import UsageMeter
from rlaif.records import ImportRow, PromptRow
from rlaif.review import import_export
from rlaif.run.run import Run
from tests.fake_server import Fault, ScriptedServer

CORPUS = Path(__file__).parent / "corpus.jsonl"


def cases() -> list[dict[str, Any]]:
    """Return the cases: {"kind", "name" (of the file), "text", "error"}. If "bytes" is set, text is latin-1."""
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]


def error_text(case: dict[str, Any], folder: Path, queue: Run | None) -> str:
    """Return the error text for ``case``, with DIR for its folder, or "accepted" without an error."""
    try:
        _submit(case, folder, queue)
    except (RlaifError, RequestFailedError) as error:
        return _normalize(str(error).replace(str(folder), "DIR"))
    return "accepted"


def _normalize(message: str) -> str:
    """Replace lists that grow with the code, and ids."""
    message = re.sub(r"Available: [^.]*\.", "Available: ...", message)
    message = re.sub(r"expected: [a-z_, ]*", "expected: ...", message)
    return re.sub(r"\b[0-9a-f]{16}\b", "ID", message)


def _submit(case: dict[str, Any], folder: Path, queue: Run | None) -> None:
    """Pass ``case`` to the code that reads its kind of input."""
    text = case["text"]
    if case["kind"] == "replies":
        _request_reply(text)
        return
    path = folder / case["name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if case["kind"] == "reviews":
        assert queue
        text = _fill_placeholders(text, queue, folder)
    path.write_bytes(text.encode("latin-1") if case.get("bytes") else text.encode("utf-8", "surrogatepass"))
    match case["kind"]:
        case "prompts":
            sources.validate_source(str(path), PromptRow, "stop", lambda line: None)
        case "imports":
            sources.validate_source(str(path), ImportRow, "stop", lambda line: None)
        case "settings":
            load(path.parent, {}, {})
        case "judges":
            (path.parent / "prompt.md").write_text(case.get("prompt", PROMPT))
            judge_file.load_judge(path.parent)
        case "reviews":
            assert queue
            import_export.import_reviews(queue, path, annotator="ann", seed=0)


PROMPT = "# System\nRules.\n# User\n{conversation}\n{reference}\n{response_a}\n{response_b}\n{reply}\n"


def _fill_placeholders(text: str, queue: Run, folder: Path) -> str:
    """Replace PAIR0, LEFT0, RIGHT0, PROMPT0 ... by the values of the queue."""
    import csv

    queue_file = folder / "queue.csv"
    import_export.export_queue(queue, queue_file, format="csv", annotator="ann", seed=0)
    with queue_file.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            for name, column in (("PAIR", "pair_id"), ("LEFT", "left"), ("RIGHT", "right"), ("PROMPT", "prompt")):
                text = text.replace(f"{name}{number}", row[column])
    return text


def _request_reply(reply: dict[str, Any]) -> None:
    """Send a request to a server that answers with ``reply``."""
    response = Fault(reply.get("status", 200), reply.get("headers", {"Content-Type": "application/json"}),
                  reply.get("body", "").encode("latin-1"))  # fmt: skip

    async def main(url: str) -> None:
        async with Client("m", [url], ClientConfig(max_attempts=1), UsageMeter(), key="sk-secret") as client:
            await client.chat({"messages": [{"role": "user", "content": "hello"}]})

    with ScriptedServer(lambda body: response) as server:
        try:
            asyncio.run(main(server.url))
        except RlaifError as error:
            if error.location:
                error.location = error.location.replace(str(server.port), "PORT")
            raise


def main() -> None:
    import tempfile

    from tests.bad.test_bad_input import make_queue

    with tempfile.TemporaryDirectory() as temp_dir:
        queue = make_queue(Path(temp_dir) / "queue")
        lines = []
        for number, case in enumerate(cases()):
            folder = Path(temp_dir) / str(number)
            folder.mkdir()
            lines.append(json.dumps({**case, "error": error_text(case, folder, queue)}, ensure_ascii=True) + "\n")
            sys.stdout.write(f"{case['kind']:<9}{str(case['text'])[:70]!r}\n    {json.loads(lines[-1])['error']}\n")
    CORPUS.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

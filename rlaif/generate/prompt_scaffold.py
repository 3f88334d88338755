"""``rlaif prompts new``: a prompt file with a row of each kind, ready to edit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rlaif import resources
from rlaif.errors import RlaifError, UsageError

TEMPLATE_ROWS: list[dict[str, Any]] = [
    {"prompt": "What is asked. This is all that a row needs.", "tags": ["example"]},
    {"id": "with-all", "system": "Who answers, and how.", "prompt": "How many rolls are left over of 154 in bags of 6?",
     "reference": "4: what a good answer says. The judges see it, the policy does not.",
     "checklist": ["What a judge should look for, point by point"],
     "checks": [{"kind": "number", "value": 4}, {"kind": "length", "unit": "words", "max": 60}]},
    {"prompt": [{"role": "user", "content": "A conversation."}, {"role": "assistant", "content": "Its next turn."},
                {"role": "user", "content": "The turn that is to be answered."}]},
]  # fmt: skip


def create_prompt_file(name: str, parent: Path = Path("prompts")) -> Path:
    """The new file ``parent``/``name``.jsonl. Raises :class:`UsageError` for a name that cannot be one or is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise UsageError(
            f"{name!r} cannot be a prompt set's name", hint="Use small letters, digits, - and _, a letter first."
        )
    path = parent / f"{name}.jsonl"
    if path.exists() or name in resources.prompt_sets():
        raise UsageError(f"there is a prompt set {name!r} already", hint="Take another name.")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TEMPLATE_ROWS), encoding="utf-8")
    except OSError as error:
        raise RlaifError(f"cannot be written: {error.strerror}", location=str(path)) from None
    return path

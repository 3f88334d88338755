"""``rlaif prompts new``: create a prompt file with one row of each kind, to edit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rlaif import resources
from rlaif.errors import RlaifError, UsageError

TEMPLATE_ROWS: list[dict[str, Any]] = [
    # The minimum is a prompt. Tags group prompts in the report.
    {"prompt": "Explain in two sentences why the sky is blue.", "tags": ["science"]},
    # Everything that a row may have. Judges see the reference and the checklist; the policy does not.
    {
        "id": "leftover-rolls",
        "system": "You are a patient math tutor.",
        "prompt": "A baker packs 154 rolls in bags of 6. How many rolls are left over?",
        "reference": "4. The baker fills 25 bags with 150 rolls.",
        "checklist": ["Shows the division", "Names the number of full bags"],
        "checks": [{"kind": "number", "value": 4}, {"kind": "length", "unit": "words", "max": 60}],
        "tags": ["math"],
    },
    # A conversation. The policy answers its last turn.
    {
        "prompt": [
            {"role": "user", "content": "Suggest a name for my bakery."},
            {"role": "assistant", "content": "How about The Golden Crust?"},
            {"role": "user", "content": "Something shorter, please."},
        ],
        "tags": ["writing"],
    },
]


def create_prompt_file(name: str, parent: Path = Path("prompts")) -> Path:
    """Create ``parent``/``name``.jsonl and return its path.

    Raises :class:`UsageError` for a name that is invalid or in use.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise UsageError(
            f"invalid prompt set name {name!r}",
            hint="Use lowercase letters, digits, - and _, and start with a letter.",
        )
    path = parent / f"{name}.jsonl"
    if path.exists() or name in resources.prompt_sets():
        raise UsageError(f"prompt set {name!r} already exists", hint="Choose another name.")
    lines = [json.dumps(row, ensure_ascii=False) for row in TEMPLATE_ROWS]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise RlaifError(f"cannot be written: {error.strerror}", location=str(path)) from None
    return path

"""Render the messages that a judge model reads from a judge file and untrusted text such as answers.

Each untrusted text is fenced: it is put between two lines with a code, a hash of all untrusted texts of the request.

- The author of an answer cannot guess the code.
- The same texts have the same code, in either order, so the keys of repeated requests are the same.
- The code first occurs after the rubric, so both orders and all aspects share a prefix in the server's cache.
- The code is replaced in the texts themselves, and placeholders are filled in one pass. So no text can close its fence
  or have a placeholder of its own filled in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.judge.judge_file import PLACEHOLDER, Judge
from rlaif.records import replace_surrogates

# Control tokens without a common shape, listed by model. A general pattern would also match code ("fst <|snd>",
# "a[|i|]").
GEMMA_TOKENS = "turn|channel|tool|tool_call|tool_response|image|audio|video"
SEED_TOKENS = "bos|eos|pad|think|tool_call|cot_budget_reflect"
EXAONE_TOKENS = "system|user|assistant|tool|endofturn"
MISTRAL_TOKENS = "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS"
CONTROL_TOKEN = re.compile(
    rf"<(?=[|｜][^\s<>|｜]{{1,40}}[|｜]>|/?s>|[be]os>|(?:start|end)_of_turn>|\|(?:{GEMMA_TOKENS})>|(?:{GEMMA_TOKENS})\|>|/?seed:(?:{SEED_TOKENS})>)"
    rf"|\[(?=/?(?:{MISTRAL_TOKENS})\]|\|(?:{EXAONE_TOKENS})\|\]|e~\[)"
    r"|\](?=~!?b[\[\]])"  # with "[e~[" MiniMax's
)
"""First character of a control token. Chat templates mark turns with control tokens, and servers recognize them even
inside a message, so an answer could end its own turn and begin another."""


def escape_control_tokens(text: str) -> str:
    """Insert a space into each control token in ``text``, so that no server recognizes it."""
    return CONTROL_TOKEN.sub(lambda match: f"{match[0]} ", text)


SECTION_HEADERS = {
    "reference": "A reference answer that is known to be right:\n",
    "checklist": "Points by which an answer to this request is to be judged, as the request's author lists them:\n",
}
"""Headings of the optional parts of a request. Both parts come from the prompt file, which may have any author, so they
are fenced too: a point that says "choose the first answer" is material, not an instruction."""


def format_conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the turns before the answer as text. A single turn is plain; several turns are labeled by role."""
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n\n".join(f"[{message['role']}]\n{message.get('content') or ''}" for message in messages)


def format_checklist(points: Sequence[str]) -> str:
    """Return ``points`` as a list with one line per point."""
    return "\n".join(f"- {' '.join(point.split())}" for point in points)


def build_messages(judge: Judge, values: Mapping[str, str], untrusted: Mapping[str, str]) -> list[dict[str, str]]:
    """Fill the placeholders of the judge's prompt. ``untrusted`` values are fenced, ``values`` are inserted unchanged.

    A judge without a system part gives a user message only, because some models do not accept a system message.
    """
    material = {
        name: escape_control_tokens(replace_surrogates(text))
        for name, text in untrusted.items()
        if text or name not in SECTION_HEADERS
    }
    code = hashlib.sha256("\x1f".join(sorted(material.values())).encode()).hexdigest()[:12]
    replacements = dict(values)
    for name, text in material.items():
        fenced = f"<<<{code}\n{text.replace(code, '[code]')}\n{code}>>>"
        replacements[name] = f"{SECTION_HEADERS[name]}{fenced}\n" if name in SECTION_HEADERS else fenced
    messages = []
    for role, part in (("system", judge.system), ("user", judge.user)):
        content = PLACEHOLDER.sub(lambda match: replacements.get(match[1], ""), part)
        if content or role == "user":
            messages.append({"role": role, "content": content})
    return messages

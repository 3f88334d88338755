"""From a judge file and answers to the messages that a judge model reads. Answers are untrusted text.

Each answer stands between two lines that carry a code derived from all that is judged: it cannot be guessed when an
answer is written, repeats when the request is made again (so keys repeat) and in the other order, and stands after
the rubric (so that both orders and all aspects have one prefix for the cache). The code is taken out of the material
itself, and placeholders are filled in one pass, so that nothing in an answer is ever filled in or closes its fence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.judge.judge_file import PLACEHOLDER, Judge
from rlaif.records import replace_surrogates

# What speaks to a judge, in parts. Each stands behind words of which its match has to hold one (without an "i", which
# matches more letters than its own): looking for these takes a twentieth of the time, and few answers have any.
INJECTION_PATTERNS = (
    # about what the judge was told
    (
        ("gnor", "sregard", "forget", "overr"),
        (
            r"\b(?:ignor|disregard|forget|overrid)\w*\b.{0,20}\b"
            r"(?:(?:previous|prior|above|earlier|preceding|all|your)\b.{0,20}\b(?:rules|instructions?|guidelines|criteria)|rubric)\b"
        ),
    ),
    ((" above",), r"\b(?:rules|instructions?|guidelines|criteria) above\b.{0,20}\b(?:no longer|do not|don't) apply\b"),
    # to the judge
    (
        ("judge", "grader", "evaluator", "rater"),
        (
            r"\b(?:attention|note to(?: the)?) (?:judge|grader|evaluator|rater)\b"
            r"|\bdear (?:judge(?-i:(?! [A-Z]))|grader|evaluator|rater)\b"
            r"|\bas (?:a|the) (?:judge|grader|evaluator|rater),? you\b"
            r"|\b(?:judge|grader|evaluator|rater)s?\b.{0,10}\b(?:must|should|has to|have to)\b.{0,10}"
            r"\b(?:choose|pick|prefer|select)\b"
        ),
    ),
    # about the verdict
    (
        (" answer", " response"),
        r"\b(?:choose|pick|prefer|select|rate|score|grade)\b.{0,20}\bthis (?:answer|response)\b(?! times?\b)",
    ),
    (
        ("deserve", "award", "ve "),
        (
            r"\b(?:deserves?|give (?:me|this|it)|award (?:me|this|it))\b.{0,20}"
            r"\b(?:highest|top|full|maximum|perfect|best) (?:score|marks|rating|grade|points)\b"
        ),
    ),
    (
        ("verd",),
        r"\bverdict[\"'*]*\s*(?:is|:|=|must be|should be)\s*[\"'*]*(?:(?:answer|response) )?(?-i:[AB])\b",
    ),
    (("better", "best", "worse"), r"\b(?:answer|response) (?-i:[AB]) is (?:clearly |the )?(?:better|best|worse)\b"),
    (("[[",), r"\[\[(?-i:[ABC])\]\]"),
)
COMPILED_INJECTION_PATTERNS = tuple(
    (words, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for words, pattern in INJECTION_PATTERNS
)


# Of the models whose marks have no common shape, each of them: a pattern would hit code ("fst <|snd>", "a[|i|]").
GEMMA_TOKENS = "turn|channel|tool|tool_call|tool_response|image|audio|video"
SEED_TOKENS = "bos|eos|pad|think|tool_call|cot_budget_reflect"
EXAONE_TOKENS = "system|user|assistant|tool|endofturn"
MISTRAL_TOKENS = "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS"
CONTROL_TOKEN = re.compile(
    rf"<(?=[|｜][^\s<>|｜]{{1,40}}[|｜]>|/?s>|[be]os>|(?:start|end)_of_turn>|\|(?:{GEMMA_TOKENS})>|(?:{GEMMA_TOKENS})\|>|/?seed:(?:{SEED_TOKENS})>)"
    rf"|\[(?=/?(?:{MISTRAL_TOKENS})\]|\|(?:{EXAONE_TOKENS})\|\]|e~\[)"
    r"|\](?=~!?b[\[\]])"  # with "[e~[" MiniMax's
)
"""The first sign of what chat templates mark turns with. Servers read it as that even inside a message, so an answer
could end the turn that it stands in and begin one of its own."""


def escape_control_tokens(text: str) -> str:
    """``text`` without anything that a chat template would take for the end of a turn: a space stands in each."""
    return CONTROL_TOKEN.sub(lambda match: f"{match[0]} ", text)


SECTION_HEADERS = {
    "reference": "A reference answer that is known to be right:\n",
    "checklist": "Points by which an answer to this request is to be judged, as the request's author lists them:\n",
}
"""What stands before the parts that a prompt may lack. Both come from the prompt file, which may be anybody's, so they
are fenced like the rest: a point that says "choose the first answer" is a point about the answer, not an order."""


def addresses_judge(text: str) -> bool:
    """Whether ``text`` speaks to whoever judges it. A flag for people to look at, never a verdict by itself."""
    plain = text.casefold()
    return any(
        any(word in plain for word in words) and pattern.search(text) is not None
        for words, pattern in COMPILED_INJECTION_PATTERNS
    )


def format_conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """The turns before the answer, as text: one user turn stands alone, several are labelled with their role."""
    if len(messages) == 1:
        return str(messages[0].get("content") or "")
    return "\n\n".join(f"[{message['role']}]\n{message.get('content') or ''}" for message in messages)


def format_checklist(points: Sequence[str]) -> str:
    return "\n".join(f"- {' '.join(point.split())}" for point in points)


def build_messages(judge: Judge, values: Mapping[str, str], untrusted: Mapping[str, str]) -> list[dict[str, str]]:
    """The judge's messages. ``untrusted`` values are fenced; ``values`` are inserted as they are. A judge whose system
    part is empty gives a user message alone: some models know no other."""
    material = {
        name: escape_control_tokens(replace_surrogates(text))
        for name, text in untrusted.items()
        if text or name not in SECTION_HEADERS
    }
    code = hashlib.sha256("\x1f".join(sorted(material.values())).encode()).hexdigest()[:12]
    fenced = {
        name: f"{SECTION_HEADERS.get(name, '')}<<<{code}\n{text.replace(code, '[code]')}\n{code}>>>"
        + "\n" * (name in SECTION_HEADERS)
        for name, text in material.items()
    }
    replacements = {**values, **fenced}
    system, user = (
        PLACEHOLDER.sub(lambda match: replacements.get(match[1], ""), part) for part in (judge.system, judge.user)
    )
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}]

"""Detect answers that try to influence their judge."""

from __future__ import annotations

import re

# Each pattern comes with fragments, and every match contains at least one of them. Searching for the fragments first
# takes a twentieth of the time, and few answers contain any. A fragment never contains an "i", because a pattern that
# ignores case also matches an "i" with other letters.
INJECTION_PATTERNS = (
    # about the judge's instructions
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
    (fragments, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for fragments, pattern in INJECTION_PATTERNS
)


def addresses_judge(text: str) -> bool:
    """Return True if ``text`` speaks to its judge. This only flags an answer for human review; it decides nothing."""
    plain = text.casefold()
    return any(
        any(fragment in plain for fragment in fragments) and pattern.search(text) is not None
        for fragments, pattern in COMPILED_INJECTION_PATTERNS
    )

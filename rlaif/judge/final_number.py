"""Read the final number of an answer as a person would, in any script and in the number styles of several languages.

The rules, in order:

1. The last ``\\boxed{}`` is the answer.
2. Otherwise the last sentence that announces an answer ("the answer is", "Result:", "答案"), unless a later one
   corrects it.
3. Otherwise the last number of the text.

Numbers that only name, date, round or restrict something do not count: list numbers, "Step 3", dates, times, "GPT-4",
"(rounded to 2 decimals)", "not 12". Ordinals, years and numbers in words count only if they are alone.

If people would disagree, the text has none: ranges, lists, "5 or 6", "2 hours and 30 minutes", "3 out of 4".
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from dataclasses import replace

from rlaif.judge.answer_text import blank_excluded, drop_code, last_boxed, needs_evaluation, plain_text, to_ascii_digits
from rlaif.judge.number_parsing import Number, ParsedText, number_in_words, parse_numbers

Evaluate = Callable[[str], float | None]
"""Returns the value of an expression in LaTeX, or None if it is not a real number."""

_SEGMENT_END = re.compile(r"\n+|(?<=[.!?…])(?<!incl\.)(?<!inkl\.)(?<!approx\.)(?<!\bca\.)[^\S\n]+(?=\S)|(?<=[。！？])")
_CUE = re.compile(
    r"(?:####|"
    r"\b(?:final |correct )?(?:answer|result|solution)s?\b|"
    r"\b(?:antwort|ergebnis|lösung|réponse|résultat|respuesta|resultado|solución|risposta|risultato|resposta)\b|"
    r"\b(?:ответ|результат)\b|答案|结果|結果|答え|答:|答：|उत्तर|الجواب|الإجابة|النتيجة)",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:wait|actually|sorry|correction|wrong|mistake|incorrect|instead|moment|falsch|fehler|korrektur|erreur|"
    r"en fait|perdón|error|en realidad|нет|ошибка)\b|不对|不對|等等|更正|訂正|間違",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"\s*(?:note|nb|n\.b\.|let me know|(?:i )?hope|please|feel free|explanation|reason(?:ing)?|erklärung|"
    r"explication|explicación|解释|説明|if you|i (?:checked|verified|used|assumed)|"
    r"this (?:took|used|assumes|is because)|(?:we|i) used|see|(?:let me |let's |to )?(?:double[- ])?(?:check|verify)|"
    r"verification|probe|vérification|comprobación|验算|検算|hinweis|anmerkung|siehe|vgl|remarque|nb|voir|nota|"
    r"véase|ver|примечание|см|注|注意|备注|如果|参见|ご不明|なお|補足)\b",
    re.IGNORECASE,
)
_RESULT = re.compile(
    r"=|→|\b(?:so|thus|hence|therefore|is|are|equals?|gets?|makes?|gives?|also|ist|sind|donc|est|son|es)\b|"
    r"所以|因此|等于|です",
    re.IGNORECASE,
)
_OR_BEFORE = re.compile(
    r"(?:\b(?:or|oder|ou|o|или)\s*(?:about|roughly|approximately|etwa|environ|unos)?\s*|或者?|または)$", re.IGNORECASE
)
_RESTRICTION = re.compile(
    r"(?:\b(?:incl|inkl)\.\s*|\b(?:including|for|per|für|pro|pour|par|para|por|на|from|aus|every|each|with|"
    r"after(?: \w+ing(?: away)?)?|nach|après|después de)\s+(?:the|each|every|all|die|les|los)?\s*)$",
    re.IGNORECASE,
)


def final_number(text: str, evaluate: Evaluate) -> tuple[float, ...] | None:
    """Return the readings of the final number of ``text``.

    Empty if people would disagree about it; None if it has none, or only an expression that cannot be evaluated.
    "50%" can be read as 50 and 0.5, "1.5 million" as 1500000 and 1.5. ``evaluate`` gets LaTeX expressions
    that are more than a number, like ``\\sqrt{2}``.
    """
    text = to_ascii_digits(text)
    boxed = last_boxed(text)
    if boxed is not None and needs_evaluation(boxed):
        text = f"${boxed}$"
    else:
        text = drop_code(text) if boxed is None else boxed
    plain, sources = plain_text(text)
    cleaned, weak = blank_excluded(plain)
    parsed = parse_numbers(cleaned, plain, sources)
    item = _choose(parsed)
    if item is None:
        return (weak[-1][1],) if weak else number_in_words(cleaned)
    if item.source:
        value = evaluate(item.source)
        return None if value is None else (value,)
    return None if item.is_expression else item.readings


def _choose(parsed: ParsedText) -> Number | None:
    """Return the item that is the answer, or None if the text has no number."""
    items = _drop_remarks(parsed)
    if not items:
        return None
    segments = _segments(parsed.text)
    starts = [start for start, _ in segments]

    def segment_of(item: Number) -> int:
        return bisect.bisect_right(starts, item.start) - 1

    def is_remark(number: int) -> bool:
        segment = parsed.text[slice(*segments[number])]
        return bool(_REMARK.match(segment)) or segment.rstrip().endswith(("?", "？"))

    numbered = [(segment_of(item), item) for item in items]
    cued = _cued_item(parsed, segments, numbered)
    if cued is not None:
        return cued
    kept = [(number, item) for number, item in numbered if not is_remark(number)]
    return _last_of(parsed, [item for _, item in kept or numbered], segments)


def _segments(text: str) -> list[tuple[int, int]]:
    ends = [match.end() for match in _SEGMENT_END.finditer(text)] + [len(text) + 1]
    return list(zip([0, *ends], ends, strict=False))


def _cued_item(parsed: ParsedText, segments: list[tuple[int, int]], items: list[tuple[int, Number]]) -> Number | None:
    """Return the number of the last sentence that announces an answer, or None.

    ``items``: the numbers with the index of their segment. The number may be in the line after the announcement.
    """
    for number in range(items[-1][0], -1, -1):
        start, end = segments[number]
        cues = list(_CUE.finditer(parsed.text, start, min(end, len(parsed.text))))
        for cue in reversed(cues):
            index = bisect.bisect_left(items, cue.end(), key=lambda pair: pair[1].start)
            if index == len(items):
                continue
            first, rest = items[index][0], parsed.text[cue.end() : end]
            if first > number and not (
                re.match(r"[\s\w]{0,20}[:=]?\s*$", rest)
                and not parsed.text[cue.end() : segments[first][0]][len(rest) :].strip(" \n:*=.-")
            ):
                continue
            return _announced(parsed, segments, items[index:])
    return None


def _announced(parsed: ParsedText, segments: list[tuple[int, int]], items: list[tuple[int, Number]]) -> Number:
    """Return the number of the first segment of ``items``, unless a later one corrects or contradicts it."""
    first = items[0][0]
    answer = _last_of(parsed, [item for number, item in items if number == first], segments)
    later = [pair for pair in items if pair[0] > first and not _REMARK.match(parsed.text[slice(*segments[pair[0]])])]
    if not later:
        return answer
    if _CORRECTION.search(parsed.text[segments[first][1] : later[-1][1].start]):
        return _last_of(parsed, [item for _, item in later], segments)
    last_number, last = later[-1]
    lead = parsed.text[segments[last_number][0] : last.start]
    if last.readings != answer.readings and _RESULT.search(lead):
        return replace(answer, readings=())
    return answer


def _last_of(parsed: ParsedText, items: list[Number], segments: list[tuple[int, int]]) -> Number:
    """Return the last of ``items``; without readings if another one is as likely meant."""
    count = len(items)
    starts = [start for start, _ in segments]
    while True:
        last = items[count - 1]
        before = parsed.before(last)
        start = starts[bisect.bisect_right(starts, last.start) - 1]
        previous = items[count - 2] if count > 1 and items[count - 2].start >= start else None
        if previous is None or not _RESTRICTION.search(before):
            break
        count -= 1  # 750 g for 10 people
    if last.is_expression and count > 1 and re.fullmatch(r"[^=\n]*[=≈]\s*", parsed.between(items[count - 2], last)):
        return items[count - 2]  # 12 = 3 × 4
    if previous and _OR_BEFORE.search(before) and not set(previous.readings) & set(last.readings):
        return replace(last, readings=())
    line_start = parsed.text.rfind("\n", 0, last.start) + 1
    is_table_row = parsed.text[line_start : line_start + 3].lstrip().startswith("|")
    if is_table_row and count > 1 and items[count - 2].start >= line_start:
        return replace(last, readings=())
    return last


def _drop_remarks(parsed: ParsedText) -> list[Number]:
    """Drop the numbers in parentheses with other words, if others are outside.

    The same quantity in another unit, as in "26 miles (41.8 km)", leaves no final number.
    """
    items = list(parsed.items)
    starts = [item.start for item in items]
    dropped: set[int] = set()
    last_outside = -1
    checked = 0
    for match in re.finditer(r"\(([^()]*)\)", parsed.text):
        first, end = bisect.bisect(starts, match.start()), bisect.bisect(starts, match.end())
        for index in range(checked, first):
            last_outside = index
        checked = end
        if first == end or len(items) - len(dropped) == end - first:
            continue
        if last_outside >= 0 and _is_same_quantity(parsed.text, items[last_outside], items[first:end], match):
            previous = items[last_outside]
            if not set(previous.readings) & set(items[first].readings):
                items[last_outside] = replace(previous, readings=(), source="", is_expression=False)
        elif end - first == 1 and _is_bare(match[1], items[first], match.start(1)):
            last_outside = first
            continue
        dropped.update(range(first, end))
    return [item for index, item in enumerate(items) if index not in dropped]


def _is_bare(content: str, item: Number, offset: int) -> bool:
    """Return True if the parenthesis ``content``, which begins at ``offset``, is a number or coordinates alone."""
    rest = content[: item.start - offset] + content[item.end - offset :]
    is_number = bool(item.readings or item.source) or ("," in content and not item.is_expression)
    return is_number and not rest.strip(" ≈~$")


def _is_same_quantity(text: str, previous: Number, inside: list[Number], match: re.Match[str]) -> bool:
    """Return True if a parenthesis after ``previous`` has only one number and perhaps its unit, as in (41.8 km)."""
    item, offset = inside[0], match.start(1)
    gap = text[previous.end : min(match.start(), previous.end + 60)]
    if previous.end + len(gap) < match.start():
        return False
    rest = match[1][: item.start - offset] + match[1][item.end - offset :]
    is_measure = len(inside) == 1 and item.readings and re.fullmatch(r"[\s≈~$]*[^\W\d]{0,12}[²³/%°\w\s.]{0,6}", rest)
    if not is_measure or match[1][: item.start - offset].strip("≈~$ ") or "\n" in gap:
        return False
    # "The total of 5 boxes is (12)" is one number after another
    return not previous.is_expression and not (
        _is_bare(match[1], item, offset) and re.search(r"\w{3,}\s+\w{2,}|[=:→≈]", gap)
    )

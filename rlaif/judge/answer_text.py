"""Prepare an answer for reading its numbers: ASCII digits, no Markdown, nothing that does not count.

Removed are Markdown, HTML tags, formatting LaTeX, code blocks and list numbers. Numbers that only name, date, round or
restrict something are blanked: "Step 3", dates, times, "GPT-4", "(rounded to 2 decimals)", "not 12".
"""

from __future__ import annotations

import itertools
import re
import unicodedata

MAX_EXPRESSIONS = 1000
"""LaTeX expressions that are kept for evaluation, of which at most one is evaluated."""
MAX_EXPRESSION_LENGTH = 500
"""Longest LaTeX expression that is evaluated, in characters."""
_PLAIN_CHARACTERS = str.maketrans(
    "−﹣－＋＝（）［］｛｝：％٪＄￥，．٫٬⁄＊／＜＞～〜",
    "---+=()[]{}:%%$¥,..,/*/<>~~",
)
_TOO_MANY_DIGITS = re.compile(r"\d{400,}")
_SUBSCRIPTS = re.compile("[₀-₉]+")
BLANK = "□"
"""Replaces what does not count. It is neither a letter nor a space, so words on both sides stay apart."""

CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
LATIN = "A-Za-zÀ-ʯͰ-ϿЀ-ӿ"
_LATEX_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname|emph)\s*\{([^{}]*)\}"
)
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}|(\d)\s*(\d))")
_LATEX_SYMBOLS = (
    (re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}(?:\{[lcr|]*\})?|(?<!\\)&"), " "),
    (re.compile(r"\\\\"), "\n"),
    (re.compile(r"\{,\}"), ""),
    (re.compile(r"(?<=\d)\\[,!;: ](?=\d{3})"), ""),
    (re.compile(r"\\[,!;: ]|\\q?quad\b|~(?=\\)"), " "),
    (re.compile(r"\\([%$#&_{}])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
    (re.compile(r"\\div(?![A-Za-z])"), "÷"),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"\\geq?(?![A-Za-z])"), "≥"),
    (re.compile(r"\\leq?(?![A-Za-z])"), "≤"),
    (re.compile(r"\\pi(?![A-Za-z])"), "π"),
    (re.compile(r"\\(?:approx|simeq)(?![A-Za-z])"), "≈"),
    (re.compile(r"\\(?:(?:long)?rightarrow|to|implies|Rightarrow|therefore|quad)(?![A-Za-z])"), "→"),
    (re.compile(r"\^\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$([^$\n]+)\$", re.DOTALL)
_MATH_DELIMITER = re.compile(r"\\[()\[\]]|\$\$")
_NOT_A_NUMBER_ALONE = re.compile(r"\\[a-zA-Z]+|\d!\s*$|\^\{[^{}]*\{")
_TO_LATEX = (("×", "\\times "), ("÷", "\\div "), ("π", "\\pi "), ("√", "\\sqrt "))
_STRIKETHROUGH = re.compile(r"~~[^~\n]+~~")
_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>")
_LINE_PREFIX = re.compile(r"^[ \t]*(?:>[ \t]*)*(?:#{1,6}[ \t]+)?(?:[-*+•–][ \t]+)?", re.MULTILINE)
_LIST_NUMBER = re.compile(r"^[ \t]*\(?(\d{1,3})[.)][ \t]+(?=\S)", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[^\n]*\n(.*?)(?:^[ \t]*\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
_STARS = re.compile(r"([^\S\n]?)(\*+)(?=([^\S\n]?)(.?))")

# What does not count

_MONTH = (
    r"(?:jan|feb|mar|mär|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez|janv|févr|avr|juin|juil|août|déc|ene|abr|"
    r"ago|dic|янв|фев|мар|апр|ма[йя]|июн|июл|авг|сен|окт|ноя|дек)[^\W\d_]{0,8}\.?"
)
_LABEL_WORD = (
    "step|question|problem|exercise|task|figure|fig|table|page|pp?|chapter|section|theorem|lemma|equation|eq|part|"
    "method|rule|example|appendix|note|version|line|row|column|round|level|no|nr|schritt|frage|aufgabe|abbildung|abb|"
    "tabelle|seite|kapitel|abschnitt|teil|gleichung|satz|beispiel|étape|exercice|tableau|chapitre|partie|"
    "équation|théorème|exemple|paso|pregunta|problema|ejercicio|figura|tabla|página|capítulo|sección|parte|ecuación|"
    "teorema|ejemplo|шаг|вопрос|задача|рис|таблица|страница|глава"
)
_DIGITS_WORD = (
    r"decimal|significant|sig\b|digits?|d\.?p\.?\b|places?|(?:nachkomma)?stellen|dezimal\w*|décimale|chiffres|"
    r"decimales|cifras|знак"
)
_BEFORE_YEAR = "in|since|by|as of|until|before|after|im jahre?|seit|en|depuis|desde|в|с"
_YEAR = r"((?:1[5-9]|20)\d\d)"
_EXCLUDED = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(?:https?://|www\.)\S+|(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.-]+",
        r"(?<!\d)\d{4}-\d{1,2}-\d{1,2}(?!\d)|(?<!\d)\d{1,2}[/.]\d{1,2}[/.]\d{4}(?!\d)",
        r"(?<!\d)\d+年\s*\d+月(?:\s*\d+日)?|(?<!\d)\d{1,2}月\s*\d{1,2}日",
        rf"(?<!\d)\d{{1,2}}(?:st|nd|rd|th|er|\.)?\s+(?:of\s+|de\s+)?{_MONTH}(?![^\W\d_])(?:,?\s+(?:de\s+|del\s+)?\d{{4}})?",
        rf"(?<![^\W\d_]){_MONTH}(?![^\W\d_])\s+\d{{1,2}}(?:st|nd|rd|th)?(?!\d)(?:,?\s+\d{{4}}(?!\d))?",
        r"(?<![\d.,])\d{1,2}\s?h\s?\d{2}(?!\d)",
        r"(?<![\d.])\d{1,2}:\d{2}(?::\d{2})?(?!\d)(?:\s*[ap]\.?m\b\.?)?",
        r"(?<![\d.,])\d{1,2}\s*(?:[ap]\.?m\b\.?|o[’']clock|uhr\b)",
        rf"\b(?:{_LABEL_WORD})\b\.?\s*#?\(?\d+(?:\.\d+)*\)?(?![\d%])",
        r"第\s*\d+\s*[步题題章页頁节節问問例图圖表条條]|(?:手順|ステップ|問題?|図|表|例|步骤|圖|图|题)\s*\d+(?![\d.]*[个個人円元%])",
        # what something is rounded to, or accurate to
        rf"(?:to|auf|à|a|до|with)\s+(?:about\s+)?\d+\s*(?:{_DIGITS_WORD})[^\W\d_]*",
        r"小数(?:点)?(?:后|後)?第?\s*\d+\s*位|(?:到|至)\s*\d+\s*位小数|\d+\s*位小数",
        rf"\b(?:where|wobei|où|donde)\s+\$?\s*[{LATIN}][\w{{}}]{{0,5}}\s*=\s*-?\d[\d.,]*(?<![.,])",
        r"(?:nearest|within|auf ganze|innerhalb von)\s+\d[\d.,]*\s*%?",
        # what is denied: "not 12", "12 is wrong" is left to the reader
        r"\b(?:not|nicht|rather than|instead of|statt|et non|y no|а не)\s+(?:[$€£¥]\s?)?[-+]?\d[\d.,]*(?<![.,])%?",
        r"(?:不是|而不是)\s*[-+]?\d[\d.,]*(?<![.,])",
        r"<3(?!\d)|\ban?\s+\d+th\b",
        # identifiers, indices, arguments
        rf"\b(?!(?:USD|EUR|GBP|CHF|INR|JPY|RS)\d)[{LATIN}][{LATIN}\d]*(?:[-‑]\d[\w.-]*\w|[-‑]?\d\w*(?:\.\d+)*)",
        rf"[{LATIN})}}]_(?:\{{[^{{}}]*\}}|\d+)",
        rf"(?<![{LATIN}])[a-zA-Z]\(\s*-?\d+\s*\)",
        rf"(?<=[{LATIN}])\s*\^\s*(?:\{{[^{{}}]*\}}|[-+]?\d+)",
        r"(?<![\d.,])\d+(?:\.\d+){2,}(?<!\.\d{3})(?![\d])",
    )
)
_TOLERANCE = re.compile(r"(?<=[\d%])([^\S\n]*[^\W\d_]{0,4}[^\S\n]*\(?[^\S\n]*)±[^\S\n]*\d[\d.,]*(?<![.,])")
_WEAK = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?<![\d.,-])(\d+)(?:st|nd|rd|th|er|ère|ème|e|º|ª|-?й|-?я)(?![^\W_])",
        r"第\s*(\d+)",
        r"\b(?:am|der|die|das|dem|den|im|beim|zum|zur|vom)\s+(\d+)\.(?=\s+[^\W\d_])",
        rf"\b(?:{_BEFORE_YEAR})\s+{_YEAR}(?![\d.,]*\d|\s*%)",
        rf"\b(?:the|according to)\s+{_YEAR}\s+(?:survey|census|edition|report|study|data|season)",
        rf"{_YEAR}\s*年",
        r"(?<=[^\s\[])\s?\[(\d{1,3})\](?!\()",
        r"\b(?:option|choice|variante|opción|вариант)\s+\(?(\d+)\)?(?![\d%])",
    )
)


def visible_expressions(text: str) -> str:
    """Return ``text`` so that math-verify finds its expressions.

    It overlooks a number right after a bracket, a colon, a quotation mark, an arrow, Markdown or a CJK letter, and
    takes an earlier one. A text with LaTeX keeps it: math-verify looks for LaTeX first.
    """
    text = to_ascii_digits(text)
    if "\\" in text or "$" in text:
        return text
    text = plain_text(drop_code(text))[0]
    text = re.sub(r"[-=]+>|[→⇒⟶↦≈≃~:]", " ", text)
    text = re.sub(r"(?<![\w)])\(([-+]?[\d.,/ ]+)\)(?![\w(])", r" \1 ", text)
    return re.sub(rf"(?<=[{CJK}])(?=[-+\w])|(?<=[\w%])(?=[{CJK}])|[。、，；！？]", " ", text)


def last_latex(text: str) -> str | None:
    """Return the last LaTeX expression of ``text`` between math delimiters, without them, or None."""
    matches = list(_MATH.finditer(text))
    return next(filter(None, matches[-1].groups())) if matches else None


def to_ascii_digits(text: str) -> str:
    """Replace the digits of all scripts, circled numbers and fullwidth punctuation by ASCII."""

    def plain(character: str) -> str:
        value = unicodedata.decimal(character, None)
        if value is not None:
            return str(value)
        if "①" <= character <= "⑳":
            return f" {int(unicodedata.numeric(character))} "
        return character

    text = _TOO_MANY_DIGITS.sub(BLANK, text)
    if not text.isascii():
        text = "".join(map(plain, text)).translate(_PLAIN_CHARACTERS)
    return text


def last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{} or \\fbox{}, or None."""
    starts = [match.end() for match in re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text)]
    if not starts:
        return None
    depth = 1
    for position in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[starts[-1] : position]
    return text[starts[-1] :]


def drop_code(text: str) -> str:
    """Remove code blocks, unless all digits are in them."""
    without = _FENCE.sub("\n", text)
    if re.search(r"\d", without):
        return without
    return _FENCE.sub(lambda match: match[2], text)


def plain_text(text: str) -> tuple[str, list[str]]:
    """Remove Markdown, HTML tags and the LaTeX that only formats.

    Returns the text and its LaTeX expressions, each of which is one private-use character in the text.
    """
    text = _SUBSCRIPTS.sub("", text)
    text = _STRIKETHROUGH.sub(" ", text)
    text = _TAG.sub(" ", text)
    for _ in range(3):  # nested
        text = _LATEX_TEXT.sub(r" \1 ", text)
    for pattern, replacement in _LATEX_SYMBOLS:
        text = pattern.sub(replacement, text)
    text = _LATEX_FRACTION.sub(
        lambda m: f"{' ' * m.string[: m.start()][-1:].isdigit()}{m[1] or m[3]}/{m[2] or m[4]}", text
    )
    sources: list[str] = []

    def hide_expression(match: re.Match[str]) -> str:
        content = next(group for group in match.groups() if group is not None)
        result = re.split(r"[=≈→]", content)[-1]
        if (
            not _NOT_A_NUMBER_ALONE.search(result)
            or len(result) > MAX_EXPRESSION_LENGTH
            or len(sources) == MAX_EXPRESSIONS
        ):
            return match[0]
        for symbol, command in _TO_LATEX:
            result = result.replace(symbol, command)
        sources.append(result)
        return f"{content[: len(content) - len(re.split(r'[=≈→]', content)[-1])]} {chr(0xE000 + len(sources) - 1)} "

    text = re.sub("[\ue000-\uf8ff]", " ", text)
    text = _MATH_DELIMITER.sub(" ", _MATH.sub(hide_expression, text))
    text = re.sub(r"\$(?=[^$\n]*[\\=^_{][^$\n]*\$)([^$\n]*)\$", r" \1 ", text)
    text = _LINE_PREFIX.sub("", text)
    text = _STARS.sub(_drop_emphasis, text)
    text = re.sub(r"[`\"“”„«»「」『』《》‘‚]|(?<!\w)['’_]+|(?<=\w)_+(?![\w{])|['’](?!\w|\"|$)", " ", text)
    text = re.sub(r"(?<!\d)(?<!\d\s)–(?=[\d$€£])", "-", text)
    numbers = [int(match[1]) for match in _LIST_NUMBER.finditer(text)]
    if len(numbers) > 1 and any(b == a + 1 for a, b in itertools.pairwise(numbers)):
        text = _LIST_NUMBER.sub("", text)
    return text, sources


def needs_evaluation(expression: str) -> bool:
    """Return True if a LaTeX expression is more than a number in digits, such as \\sqrt{2}."""
    return bool(_NOT_A_NUMBER_ALONE.search(plain_text(expression)[0]))


def _drop_emphasis(match: re.Match[str]) -> str:
    """Keep the stars of 3 * 4 and 2**10, remove those of **12**."""
    before = match.string[match.start() - 1 : match.start()] if match.start() else ""
    is_product = (
        (before.isdigit() or before == ")")
        and (match[4].isdigit() or match[4] == "(")
        and bool(match[1]) == bool(match[3])
        and len(match[2]) <= 2
    )
    return match[1] + (match[2].replace("**", "^") if is_product else "")


def blank_excluded(text: str) -> tuple[str, list[tuple[int, float]]]:
    """Blank the numbers that do not count.

    Returns the text, and the position and value of ordinals, years and citations, which count if they are alone.
    """

    def blank(match: re.Match[str]) -> str:
        return BLANK * len(match[0])

    text = _TOLERANCE.sub(lambda match: match[1] + BLANK * (len(match[0]) - len(match[1])), text)
    for pattern in _EXCLUDED:
        text = pattern.sub(blank, text)
    weak: list[tuple[int, float]] = []
    for pattern in _WEAK:
        weak += [(match.start(1), float(match[1])) for match in pattern.finditer(text)]
        text = pattern.sub(blank, text)
    return text, sorted(weak)

"""Find the numbers of a prepared text (:mod:`rlaif.judge.answer_text`), in the number styles of several languages."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlaif.judge.answer_text import LATIN, MAX_EXPRESSION_LENGTH

_SUPERSCRIPT_TABLE = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SPACE = "[ \u00a0\u2009\u202f]"
_CURRENCY = r"(?:(?:US|CA|AU|NZ|HK|C|A|R)?\$|[€£¥₹₽₩₿]|(?:USD|EUR|GBP|CHF|INR|JPY|Rs\.?)\s?)"
_MAGNITUDES = {
    "thousand": 1e3, "tausend": 1e3, "mille": 1e3, "mil": 1e3, "тысяч": 1e3, "тыс": 1e3, "million": 1e6,
    "millionen": 1e6, "mio": 1e6, "millones": 1e6, "millón": 1e6, "миллион": 1e6, "млн": 1e6, "billion": 1e9,
    "bn": 1e9, "milliarde": 1e9, "milliarden": 1e9, "mrd": 1e9, "milliard": 1e9, "миллиард": 1e9, "млрд": 1e9,
    "trillion": 1e12, "lakh": 1e5, "crore": 1e7, "लाख": 1e5, "करोड़": 1e7, "hundred": 1e2,
    "k": 1e3, "千": 1e3, "万": 1e4, "萬": 1e4, "百万": 1e6, "億": 1e8, "亿": 1e8,
}  # fmt: skip
_NUMBER = re.compile(
    rf"(?P<sign>(?<![{LATIN}\d)%°])[-–+](?=[\d.$€£¥₹])|(?:(?<=[=(:≈→]\s)|(?<=[=(:≈→])|^)[-–+][^\S\n]"
    r"|(?<![^\W\d_])(?:minus|negative|moins|menos|минус)\s+|负|負|マイナス)?"
    rf"(?P<currency>{_CURRENCY}\s?)?(?P<inner_sign>(?<=[$€£¥₹])-)?"
    rf"(?P<body>\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,'’_]\d+)*|(?<![\d.])\.\d+)"
    rf"(?P<vulgar>{_SPACE}?[¼-¾⅐-⅞])?"
    r"(?:[eE](?P<e>[+-]?\d{1,3})(?![\w^]|\.\d)"
    r"|\s*[×xX*·⋅]\s*10(?:\^\s*\{?\s*(?P<ten>[+-]?\d{1,3})\s*\}?(?![\d^])"
    r"|(?P<ten_super>[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})))?"
    rf"(?P<power>(?:\^\s*(?:\{{[^{{}}]*\}}|[-+]?\d+))+|[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{{1,3}})?"
    rf"(?P<fraction>{_SPACE}?(?P<numerator>\d+/)?(?P<denominator>(?(numerator)|/{_SPACE}?)\d+(?![\d.,]*\d)))?"
    r"(?P<percent>\s*\$?\s*(?:%|percent\b|per\s?cent\b|prozent\b|pour\s?cent\b|por\s?ciento\b|процент\w*|パーセント))?"
    rf"(?P<magnitude>\s?(?:(?:{'|'.join(sorted(_MAGNITUDES, key=len, reverse=True))})(?:s|en|ов|а)?\b\.?"
    r"|百万|[千万萬億亿]))?"
    "|(?P<only_vulgar>-?[¼-¾⅐-⅞])|(?P<source>[\ue000-\uf8ff])",
    re.IGNORECASE | re.MULTILINE,
)
_EXPRESSION_AFTER = re.compile(rf"[^\S\n]*(?:√|\\[a-z]+|[xyzn](?![{LATIN}]))")
_EXPRESSION_BEFORE = re.compile(
    rf"(?:[\dπ]\s?√|\\[a-zA-Z]+\s*[\[{{(]?|[{LATIN}²³)}}π]\s*(?:[+×*÷^]|(?<!\s)/|\s[-–]\s?)\s*"
    rf"|(?<=[{LATIN}])\s*[<>≤≥]\s*|[≤≥±<]\s*)$"
)
_OPERATOR = re.compile(
    r"\s*\)?\s*(?:[×xX*·⋅÷/+^]|(?<=\s)[-–](?=\s)|times|multiplied by|divided by|plus|minus|mal|durch|geteilt durch|"
    r"fois|moins|por|menos|más|乘以?|加|减|除以|かける|足す|引く)\s*\(?\s*√?\s*",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(
    r"[\s$]*(?:[-‑–—~/,;、،]|to|or|and|(?:out )?of(?: the)?|vs\.?|bis|oder|und|von(?: den)?|à|ou|et|sur|"
    r"de(?: los| las)?|des|a|o|u|y|e|до|или|и|из|到|至|或|或者|和|から|か|や|と|&|और|या|أو|و|إلى)[\s$]*|:",
    re.IGNORECASE,
)
_ALTERNATIVE_MEASURE = re.compile(
    r"\s*[^\W\d]{1,12}\s(?:or|oder|ou|o|или)\s+|[^\W\d]{1,3}(?:か|或者?|または)", re.IGNORECASE
)
_TIME_AND_LENGTH_UNITS = tuple(
    (re.compile(rf"\s*(?:{large})\.?\s*(?:,|and|und|et|y|и)?\s*", re.I), re.compile(rf"\s*(?:{small})", re.I))
    for large, small in (
        (r"h|hrs?|hours?|stunden?|std|heures?|horas?|час\w*|小时|小時|時間", r"m\b|min|minut|мин|分"),
        (r"m|mins?|minutes?|minuten?|minutos?|минут\w*|分钟|分鐘|分", r"s\b|sec|sek|seg|сек|秒"),
        (
            r"days?|tage?|jours?|días?|weeks?|wochen?|years?|jahre?n?|ans?|años?|months?|天|日|年",
            r"h|hour|stund|heure|hora|day|tag|jour|día|week|month|monat|mois|mes|小时|時間|个月|天",
        ),
        (r"ft|foot|feet|['’′]", r"in\b|inch|[\"”″]|$"),
        (r"lbs?|pounds?", r"oz|ounce|p\b|pence"),
        (r"dollars?|euros?|€|\$|£|francs?|marks?", r"cents?|pence|p\b|ct|centimes|céntimos|rappen"),
        (r"km|kilomet\w+", r"m\b|met"),
        (r"m|met\w+", r"cm|centi|zenti"),
        (r"kg|kilo\w*", r"g\b|gram"),
        (r"°|degrees?|grad", r"['’′]|min"),
    )
)
_DECIMAL_COMMA_WORDS = {
    "de": "der die das ist sind und beträgt ergibt ergeben also den dem ein eine insgesamt kostet nicht mit für auf es "
    "lautet leben wir antwort ergebnis strecke jeder",
    "fr": "le la les est sont et une des du il y cela coûte donc réponse résultat avec pour total au à chaque "
    "habitants",
    "es": "el la los las es son y una un del hay cuesta por respuesta resultado con para total cada en de quedan",
    "it": "il lo gli è sono e una del della ci costa quindi risposta risultato con per totale ogni di",
    "pt": "o os as é são e uma um do da há custa portanto resposta resultado com para cada em",
    "nl": "de het is zijn een en dus kost antwoord totaal met voor van er",
}
_ENGLISH_WORDS = (
    "the is are a an and of to in it that this so answer result costs makes with for we there total all each"
)
_WORD_VALUES = {
    name: value
    for value, names in {
        0: "zero zéro cero ноль", 2: "two zwei deux dos два", 3: "three drei trois tres три",
        4: "four vier quatre cuatro четыре", 5: "five fünf cinq cinco пять", 6: "six sechs seis шесть",
        7: "seven sieben sept siete семь", 8: "eight acht huit ocho восемь", 9: "nine neun nueve девять",
        10: "ten zehn dix diez десять", 11: "eleven onze одиннадцать",
        12: "twelve zwölf douze doce двенадцать", 13: "thirteen dreizehn treize trece",
        14: "fourteen vierzehn quatorze catorce", 15: "fifteen fünfzehn quinze", 16: "sixteen sechzehn",
        17: "seventeen siebzehn", 18: "eighteen achtzehn", 19: "nineteen neunzehn",
        20: "twenty zwanzig vingt veinte двадцать", 30: "thirty dreißig trente treinta тридцать",
        40: "forty vierzig quarante cuarenta сорок", 50: "fifty fünfzig cinquante cincuenta пятьдесят",
        60: "sixty sechzig soixante sesenta", 70: "seventy siebzig setenta", 80: "eighty achtzig ochenta",
        90: "ninety neunzig noventa",
    }.items()
    for name in names.split()
}  # fmt: skip
_ENGLISH_TENS = "|".join(name for name, value in _WORD_VALUES.items() if value >= 20 and name.isascii())
MAX_WORDS = 6
"""Longest text in which a small number word ("two") is taken for the answer. Longer ones use them in passing."""
_NUMBER_WORD = re.compile(
    rf"(?<![^\W\d_])(?:(?P<tens>{_ENGLISH_TENS})[- ](?P<units>two|three|four|five|six|seven|eight|nine)"
    rf"|(?P<word>{'|'.join(sorted(_WORD_VALUES, key=len, reverse=True))}))(?![^\W\d_])(?!\s+decimal)",
    re.IGNORECASE,
)
_CJK_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_CJK_NUMBER = re.compile(
    r"(?:^|[是为為は：:\s])((?:[一二三四五六七八九]百零?)?(?:[一二三四五六七八九]?十)?[一二三四五六七八九两]?)"
    r"(?=[个個只条頁页人本円元岁天。.！]|です|\s*$)"
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number in the text, or several of which none is the answer. ``readings`` is empty if people would disagree."""

    start: int
    end: int
    readings: tuple[float, ...] = ()
    is_expression: bool = False
    source: str = ""
    """LaTeX expression to evaluate if this item is chosen. Evaluating every one would take too long."""


@dataclass(slots=True)
class ParsedText:
    """A normalized text with its numbers, in order."""

    text: str
    items: list[Number] = field(default_factory=list)

    def before(self, item: Number) -> str:
        return self.text[max(0, item.start - 60) : item.start]

    def between(self, left: Number, right: Number) -> str:
        return self.text[left.end : right.start]


def _decimal_comma(text: str) -> bool | None:
    """Return True if the text writes 3,5 and 1.234; False for 3.5 and 1,234; None if it is mixed."""
    commas = len(re.findall(r"(?<![\d.,])\d+,(?:\d{1,2}|\d{4,})(?![\d.,]*\d)|(?<![\d.,])0,\d+|\d\.\d{3},\d", text))
    points = len(re.findall(r"(?<![\d.,])\d+\.(?:\d{1,2}|\d{4,})(?![\d.,]*\d)|(?<![\d.,])0\.\d+|\d,\d{3}\.\d", text))
    if commas or points:
        return None if commas and points else commas > 0
    if re.search("[А-я]", text):
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    english_words = _ENGLISH_WORDS.split()
    english = sum(word in english_words for word in words)
    others = {
        language: sum(word in names.split() for word in words) for language, names in _DECIMAL_COMMA_WORDS.items()
    }
    return max(others.values()) > english


def _parse_body(body: str, decimal_comma: bool | None) -> float | None:
    """Return the value of digits with separators, or None if they are not one number."""
    body = re.sub(r"[\s_]", "", body)
    if re.fullmatch(r"\d{1,3}(?:['’]\d{3})+(?:\.\d+)?", body):
        return float(re.sub("['’]", "", body))
    if re.fullmatch(r"\d+|\d*\.\d+", body) and not re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", body):
        return float(body)
    for separator, point in ((",", "."), (".", ",")):
        group = re.escape(separator)
        is_grouped = re.fullmatch(rf"\d{{1,3}}(?:{group}\d{{3}})+(?:{re.escape(point)}\d+)?", body)
        is_indian = separator == "," and re.fullmatch(r"\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?", body)
        if (is_grouped or is_indian) and not re.fullmatch(rf"[1-9]\d{{0,2}}{group}\d{{3}}|0{group}\d+", body):
            return float(body.replace(separator, "").replace(point, "."))
    if re.fullmatch(r"[1-9]\d{0,2}[.,]\d{3}", body):  # 1.234 or 1,234: one thousand, or one and a bit
        if decimal_comma is None:
            return None
        separator = "." if decimal_comma else ","
        return float(body.replace(separator, "").replace(",", "."))
    if re.fullmatch(r"\d+,\d+", body):
        return float(body.replace(",", "."))
    return None


def parse_numbers(cleaned: str, plain: str, sources: list[str]) -> ParsedText:
    """Return ``cleaned`` with its numbers.

    ``plain`` is the text before numbers were blanked, which shows the number style. ``sources``: its LaTeX expressions.
    """
    parsed = ParsedText(cleaned)
    parsed.items = _merge(parsed, _items(cleaned, _decimal_comma(plain), sources))
    return parsed


def _items(text: str, decimal_comma: bool | None, sources: list[str]) -> list[Number]:
    """Return the numbers in ``text``, and number words from thirteen on if there are digits too."""
    items = list(_numbers(text, decimal_comma, sources))
    if items:
        words = [(match, _word_value(match)) for match in _NUMBER_WORD.finditer(text)]
        items += [Number(*match.span(), (float(value),)) for match, value in words if value > 12]
    return sorted(items, key=lambda item: item.start)


def _numbers(text: str, decimal_comma: bool | None, sources: list[str]) -> Iterator[Number]:
    for match in _NUMBER.finditer(text):
        if match["only_vulgar"]:
            vulgar = unicodedata.numeric(match[0][-1])
            yield Number(*match.span(), (-vulgar if match[0].startswith("-") else vulgar,))
            continue
        if match["source"]:
            yield Number(*match.span(), source=sources[ord(match["source"]) - 0xE000])
            continue
        value = _parse_body(match["body"], decimal_comma)
        if value is None or _EXPRESSION_BEFORE.search(text[max(0, match.start() - 30) : match.start()]):
            yield Number(*match.span(), is_expression=value is not None)
            continue
        if _EXPRESSION_AFTER.match(text, match.end()):
            yield Number(*match.span(), is_expression=True)
            continue
        if (match["power"] or "").startswith("^"):
            source = match["body"] + match["power"]
            yield Number(
                *match.span(), source=source if len(source) < MAX_EXPRESSION_LENGTH else "", is_expression=True
            )
            continue
        root = "√" in text[max(0, match.start() - 2) : match.start()]
        if text[match.end() : match.end() + 2].strip().startswith("π"):
            value *= math.pi
        readings = _readings(match, math.sqrt(value) if root else value)
        yield Number(*match.span(), readings, is_expression=not readings)


def _readings(match: re.Match[str], value: float) -> tuple[float, ...]:
    """Return the readings of a match of _NUMBER whose digits have this ``value``."""
    if match["vulgar"]:
        value += unicodedata.numeric(match["vulgar"].strip())
    exponent = match["e"] or match["ten"] or (match["ten_super"] or "").translate(_SUPERSCRIPT_TABLE)
    if exponent:
        value = float(f"{value!r}e{int(exponent)}") if "e" not in repr(value) else value * 10.0 ** int(exponent)
    if match["power"]:
        try:
            value = value ** int(match["power"].translate(_SUPERSCRIPT_TABLE))
        except (OverflowError, ZeroDivisionError):
            return ()
    if match["fraction"]:
        denominator = float(re.sub(r"\D", "", match["denominator"]))
        if match["numerator"]:  # 2 1/2
            numerator = float(match["numerator"].rstrip("/"))
            if numerator >= denominator:
                return ()
            value += numerator / denominator
        elif denominator == 0:
            return ()
        else:
            value /= denominator
    sign = match["sign"] or match["inner_sign"] or ""
    if sign and not sign.startswith("+"):
        value = -value
    if match["percent"]:
        return (value, value / 100)
    if match["magnitude"]:
        name = match["magnitude"].strip().rstrip(".").lower()
        factor = next(
            (_MAGNITUDES[form] for form in (name, name.rstrip("s"), name[:-1], name[:-2]) if form in _MAGNITUDES), 1.0
        )
        return (value * factor, value)
    return (value,) if math.isfinite(value) else ()


def _merge(parsed: ParsedText, items: list[Number]) -> list[Number]:
    """Join numbers that belong together: arithmetic, ranges, lists, two measures of one quantity."""
    merged: list[Number] = []
    for item in items:
        if not merged:
            merged.append(item)
            continue
        last = merged[-1]
        between = parsed.between(last, item)
        signed = parsed.text[item.start : item.end].startswith(("-", "+", "–"))
        if _OPERATOR.fullmatch(between) or (
            signed and not between.strip() and re.match(r"[-+–]\s", parsed.text[item.start :])
        ):
            merged[-1] = Number(last.start, item.end, is_expression=True)
        elif (
            _ALTERNATIVE.fullmatch(between)
            or _ALTERNATIVE_MEASURE.fullmatch(between)
            or (signed and not between.strip(" "))
            or _are_two_measures(parsed, last, item, between)
            or _are_two_solutions(parsed, last, between)
        ):
            merged[-1] = Number(last.start, item.end)
        else:
            merged.append(item)
    return merged


def _are_two_measures(parsed: ParsedText, left: Number, right: Number, between: str) -> bool:
    """Return True for "2 hours and 30 minutes", and for "5 kg, 12 lb" at the end of its sentence."""
    after = parsed.text[right.end : right.end + 20]
    if any(large.fullmatch(between) and small.match(after) for large, small in _TIME_AND_LENGTH_UNITS):
        return True
    if re.search(r"\b(?:of|among|from|with|for|von|sur|de)\s+(?:the\s+)?$", parsed.before(left), re.IGNORECASE):
        return False
    is_end = re.match(r"\s*[^\W\d]{0,12}\s*[.!]?\s*(?:\n|$)", after)
    return bool(
        re.fullmatch(r"\s+[^\W\d]{1,12}\s*(?:,|;|\s(?:and|or|und|oder|et|ou|y|o|и))\s*", between, re.IGNORECASE)
        and is_end
    )


def _are_two_solutions(parsed: ParsedText, left: Number, between: str) -> bool:
    """Return True for "x = 3, y = 12" and "x = 3 or x = 5"."""
    name = rf"[{LATIN}][\w₀-₉□]{{0,8}}\s*[=≈]\s*\(?"
    is_assignment = re.search(rf"{name}$", parsed.before(left))
    joined = rf"[\s$)]*(?:,|;|and|or|und|oder|et|ou|y|o|и|или|,\s*and|,\s*or|或|和)[\s$]*{name}"
    return bool(is_assignment and re.fullmatch(joined, between, re.IGNORECASE))


def number_in_words(text: str) -> tuple[float, ...] | None:
    """Return the value of the only number word in a short text without digits."""
    if len(text.split()) > MAX_WORDS:
        return None
    values = {_word_value(match) for match in _NUMBER_WORD.finditer(text)}
    values |= {_cjk_value(match[1]) for match in _CJK_NUMBER.finditer(text) if match[1]}
    return (float(values.pop()),) if len(values) == 1 else None


def _word_value(match: re.Match[str]) -> int:
    if match["tens"]:
        return _WORD_VALUES[match["tens"].lower()] + _WORD_VALUES[match["units"].lower()]
    return _WORD_VALUES[match["word"].lower()]


def _cjk_value(digits: str) -> int:
    total, current = 0, 0
    for character in digits:
        if character in "十百":
            total += (current or 1) * (10 if character == "十" else 100)
            current = 0
        else:
            current = _CJK_DIGITS[character]
    return total + current

"""Count the characters, words, sentences, lines and paragraphs of an answer as a person would."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, Literal

import regex

from rlaif.judge.optional_modules import require_module

Unit = Literal["characters", "words", "sentences", "lines", "paragraphs"]

SCRIPT_LANGUAGES = (
    (regex.compile(r"[\p{Hiragana}\p{Katakana}]"), "ja"),
    (regex.compile(r"\p{Han}"), "zh"),
    (regex.compile(r"\p{Hangul}"), "ko"),
    (regex.compile(r"\p{Devanagari}"), "hi"),
    (regex.compile(r"\p{Arabic}"), "ar"),
    (regex.compile(r"\p{Cyrillic}"), "ru"),
    (regex.compile(r"\p{Thai}"), "th"),
)
LATIN_LANGUAGES = ("de", "en", "es", "fr", "it", "nl", "pl", "pt")
"""Languages in Latin script whose abbreviations are distinguished. Others are counted like English."""
LETTERS_PER_WORD = 3
"""Letters, without vowel and tone marks, of an average word in Thai, Lao, Khmer and Burmese."""
MAX_LINE = 20_000
"""Longest text that is given to the sentence splitter at once. Its time is quadratic in unclosed quotes."""

_CJK_CHARACTER = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")
_UNSPACED_RUN = regex.compile(r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
_FENCED_BLOCK = re.compile(r"^[ \t]*(```+|~~~+).*?(?:^[ \t]*\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
_LINE_MARK = re.compile(
    r"[ \t]*(?:>[ \t]*)*(?:#{1,6}[ \t]+)?(?:[-*+•][ \t]+)?(?:\[[ xX]\][ \t]+)?"
    r"(?:[*_]{0,2}\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.)．][*_]{0,2}(?:[ \t]+|$|(?<=．)))?"
)
_LINE_LETTER = re.compile(r"[ \t]*(?:>[ \t]*)*(?:\(?[a-zA-Z]|\(?[ivxIVX]{1,5})[.)][ \t]")
_INLINE_CODE = re.compile(r"`[^`\n]+`|https?://\S+(?<![.!?,;:)])")
_PERIOD_RUN = re.compile(r"([.!?…。])\1{3,}")
# Periods that sentencex does not know, or knows only in the right language.
_NO_SENTENCE_END = regex.compile(
    r"(?<!\p{L})(?:(?i:approx|ca|figs?|eq|cf|pp|vgl|abb|bzw)|EE|M|Mme|Mlle|S(?=\.\s+\d)|[Nn][or](?=\.\s+\d))\K\.(?=\s+\S)"
    r"|\b(?:am|der|die|das|dem|den|im|beim|vom|zum|zur)\s+\d{1,2}\K\.(?=\s+\p{Lu})"
)
_SENTENCE_IN_PARENTHESES = re.compile(r"([.!?…])([)\]])(?=\s+\S)")
_EMOJI_END = regex.compile(r"\p{Extended_Pictographic}\ufe0f?(?=\s+\p{Lu})")
_RULE = re.compile(r"[\s*_=-]+")


def count_units(text: str, unit: Unit) -> int:
    """Count the units in ``text`` without its surrounding spaces.

    - A character is what a reader sees as one: an emoji or a letter with its accents.
    - Words are separated by spaces or an em dash, and have a letter or digit. Each Chinese or Japanese character counts
      as a word, as in word processors. Thai, Lao, Khmer and Burmese do not separate words either; there the number is
      an estimate, one word per three letters.
    - A sentence ends with a period, question mark or exclamation mark, or at the end of its line, so a heading or a
      list entry is a sentence. Numbers of lists and abbreviations end none, and code blocks have none.
    - Blank lines and paragraphs do not count, nor paragraphs that are only a rule ("---").
    """
    text = text.strip().strip("\ufeff").strip()
    match unit:
        case "characters":
            return len(text.replace("\r\n", "\n")) if text.isascii() else len(regex.findall(r"\X", text))
        case "words":
            return _count_words(text)
        case "lines":
            return sum(bool(line.strip()) for line in text.splitlines())
        case "paragraphs":
            parts = re.split(r"\n\s*\n", text)
            return sum(not _RULE.fullmatch(part) for part in parts if part.strip())
        case "sentences":
            return _count_sentences(text)


def _count_words(text: str) -> int:
    count = 0
    if not text.isascii():
        count = len(_CJK_CHARACTER.findall(text))
        text = _CJK_CHARACTER.sub(" ", text)
        for run in _UNSPACED_RUN.findall(text):
            count += math.ceil(sum(character.isalpha() for character in run) / LETTERS_PER_WORD - 0.5)
        text = _UNSPACED_RUN.sub(" ", text).replace("—", " ")
    return count + sum(any(character.isalnum() for character in word) for word in text.split())


def _count_sentences(text: str) -> int:
    sentencex = require_module("sentencex")
    text = _PERIOD_RUN.sub(r"\1\1\1", _FENCED_BLOCK.sub("\n", text))
    language = sentence_language(text)
    count = 0
    lines = text.splitlines()
    letters = sum(bool(_LINE_LETTER.match(line)) for line in lines)
    for line in lines:
        mark = _LINE_MARK.match(line)
        if mark and (letters > 1 or not _LINE_LETTER.match(line)):
            line = line[mark.end() :]
        line = _NO_SENTENCE_END.sub("", _INLINE_CODE.sub("code", line))
        line = _EMOJI_END.sub(".", _SENTENCE_IN_PARENTHESES.sub(r"\2\1", line))
        for start in range(0, len(line), MAX_LINE):
            count += _count_in_line(sentencex, language, line[start : start + MAX_LINE])
    return count


def _count_in_line(sentencex: Any, language: str, line: str) -> int:
    count, previous = 0, ""
    for sentence in sentencex.segment(language, line):
        if not any(character.isalnum() for character in sentence):
            continue
        is_quotation = previous.rstrip().endswith(("」", "』")) and sentence.lstrip().startswith(("と", "って"))
        is_number = re.fullmatch(r"\s*\(?\d{1,3}[.)]\s*", sentence)
        count += not (is_quotation or is_number)
        previous = sentence
    return count


def sentence_language(text: str) -> str:
    """Return the ISO 639-1 code of the language whose abbreviations and quotes ``text`` probably uses."""
    for pattern, language in SCRIPT_LANGUAGES:
        if pattern.search(text):
            return language
    ranked = _latin_identifier().rank(" ".join(text.split()))
    return str(ranked[0][0]) if ranked[0][1] > 0.5 else "en"


@functools.cache
def _latin_identifier() -> Any:
    langid = require_module("py3langid.langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(LATIN_LANGUAGES))
    return identifier

"""Escape a text as a CSV cell that a spreadsheet neither runs nor changes, and restore the exact text.

Contract: ``unescape_cell(escape_cell(text)) == text`` for every text, even after a program has rewritten the line
breaks inside cells (LF, CRLF or CR) or has removed a cell's leading apostrophe. Only these texts change:

1. Control characters other than tab and line feed become their picture: NUL is ``␀``, carriage return ``␍``, escape
   ``␛``, delete ``␡``. A picture in the text itself gets a ``␤`` before it, and so does ``␤``. So a cell never contains
   a carriage return, and every kind of line break in it can be read as a line feed.
2. A cell gets one leading apostrophe in three cases: a spreadsheet would run it as a formula (the first character after
   white space is one of ``= + - @`` or their full-width forms, or the cell starts with a tab); a spreadsheet would read
   it as a number, date or truth value and write it back differently (``1/2``, ``007``, ``3e5``, ``TRUE``); or it starts
   with an apostrophe of its own.
"""

from __future__ import annotations

import re

_CONTROLS = [code for code in range(0x20) if chr(code) not in "\t\n"]
_PICTURE_OF = {**{code: chr(0x2400 + code) for code in _CONTROLS}, 0x7F: "\u2421"}
_CONTROL_OF = {picture: chr(code) for code, picture in _PICTURE_OF.items()}
_LITERAL_MARK = "\u2424"
_ENCODE = str.maketrans({**_PICTURE_OF, **{ord(sign): _LITERAL_MARK + sign for sign in (*_CONTROL_OF, _LITERAL_MARK)}})
_DECODE = re.compile(f"{_LITERAL_MARK}(.)|([{''.join(_CONTROL_OF)}])", re.DOTALL)

_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
_PLAIN_NUMBER = re.compile(r"0|[1-9]\d{0,14}")
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_CONVERTIBLE = re.compile(
    r"true|false"
    r"|(?=.*\d)[\d\s.,:/%$€£¥()+-]+(?:e[+-]?\d+)?(?:\s*[ap]\.?m\.?)?"
    rf"|(?:\d{{1,4}}[\s./,-]*)?{_MONTH}[\s./,-]*\d{{1,4}}(?:[\s./,-]+\d{{1,4}})?"
    rf"|\d{{1,4}}[\s./,-]*{_MONTH}",
    re.IGNORECASE,
)
_MAX_CONVERTIBLE_CHARS = 40


def escape_cell(text: str) -> str:
    """Return the cell for ``text``."""
    cell = text.translate(_ENCODE)
    return f"'{cell}" if _needs_apostrophe(cell) else cell


def unescape_cell(cell: str) -> str:
    """Return the text of ``cell``."""
    text = normalize_newlines(cell).removeprefix("'")
    if text.isascii():  # contains no picture
        return text
    return _DECODE.sub(lambda match: match[1] or _CONTROL_OF[match[2]], text)


def cell_equals(cell: str, text: str) -> bool:
    """Return True if ``cell`` is the escaped ``text``, or ``text`` itself, as a user's own script would write it."""
    return unescape_cell(cell) == text or normalize_newlines(cell) == normalize_newlines(text)


def normalize_newlines(text: str) -> str:
    """Replace CRLF and CR by LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _needs_apostrophe(cell: str) -> bool:
    if cell.startswith(("'", "\t")) or cell.lstrip().startswith(_FORMULA):
        return True
    if len(cell) > _MAX_CONVERTIBLE_CHARS:
        return False
    short = cell.strip()
    return _CONVERTIBLE.fullmatch(short) is not None and _PLAIN_NUMBER.fullmatch(cell) is None

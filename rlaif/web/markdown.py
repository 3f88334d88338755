"""Render a model's answer as passive HTML: no scripts, no requests, nothing invisible.

Contract: :func:`markdown_to_safe_html` returns only the elements and attributes listed here, for any text.
- Markup in the text is shown as text.
- Images are never loaded: the page shows their description and address.
- Links open only http, https or mailto, in a new page that receives no referrer. Their host is written next to them.
- Parts that Markdown hides are shown as text: link definitions, titles, the words after a code block's language.
- Characters that change the look of other text (terminal codes, right-to-left overrides, invisible tags) are shown by
  name: :func:`show_invisible_characters`.
- Code is colored by class names. TeX becomes MathML, or stays as source if it cannot be converted.

A text longer than ``MARKDOWN_LIMIT`` characters, or nested too deeply, is not parsed: the function returns None and the
page shows plain text.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlaif.errors import MissingDependencyError

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.rules_inline import StateInline

MARKDOWN_LIMIT = 40_000
TEX_LIMIT = 2_000
SCHEMES = {"http", "https", "mailto"}

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
# Embeddings, overrides and isolates reverse the text around them. C1 codes, zero-width and tag characters are hidden.
# Joiners (U+200C, U+200D) are kept: emoji and several scripts need them.
_HIDDEN = [
    *range(0x80, 0xA0), 0xAD, 0x200B, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF,
    *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080),
]  # fmt: skip
_VISIBLE = _PICTURES | {code: f"[U+{code:04X}]" for code in _HIDDEN}

TAGS = {
    "a", "blockquote", "br", "code", "del", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
    "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
    "math", "menclose", "mfenced", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom",
    "mprescripts", "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd",
    "mtext", "mtr", "munder", "munderover",
}  # fmt: skip
ATTRIBUTES = {
    "a": {"href", "title", "target"},
    "code": {"class"},
    "span": {"class"},
    "pre": {"class", "tabindex"},
    "div": {"class", "tabindex"},
    "ol": {"start"},
    "math": {"display", "alttext"},
    "mo": {"stretchy", "fence", "form"},
    "mstyle": {"displaystyle", "scriptlevel"},
    "mspace": {"width"},
    "mfrac": {"linethickness"},
    "menclose": {"notation"},
    "mtable": {"columnalign", "rowspacing", "columnspacing"},
    "mover": {"accent"},
}
_MATH_DELIMITERS = (("\\(", "\\)", False), ("\\[", "\\]", True), ("$$", "$$", True), ("$", "$", False))
# The parser drops text nested more deeply than its limit, and an answer must not hide a part of itself.
_NESTING = 60
_DEEP_NESTING = re.compile(rf"^(?:[ \t]*(?:>|[-*+](?=[ \t])|\d{{1,9}}[.)](?=[ \t]))){{{_NESTING // 3},}}", re.MULTILINE)
_TEX_DEFINITION = re.compile(r"\\(?:def|let|newcommand|renewcommand|DeclareMathOperator|newenvironment)")


def require_review_extra() -> None:
    """Raise :class:`MissingDependencyError` if a package of the review page is not installed."""
    try:
        import jinja2  # noqa: F401
        import latex2mathml  # noqa: F401
        import markdown_it  # noqa: F401
        import nh3  # noqa: F401
        import pygments  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the review page needs {error.name}, which is not installed",
            extra="review",
            hint="Or label in a spreadsheet: `rlaif review RUN --export queue.csv`.",
        ) from None


def show_invisible_characters(text: str) -> str:
    """Replace every character that hides or reverses text by its picture or number, and CRLF by LF."""
    text = text.replace("\r\n", "\n")
    return text if text.isascii() and text.isprintable() else text.translate(_VISIBLE)


def markdown_to_safe_html(text: str) -> str | None:
    """Return Markdown ``text`` as safe HTML, or None if it is too long or too deeply nested to be parsed."""
    import nh3

    if len(text) > MARKDOWN_LIMIT or _DEEP_NESTING.search(text):
        return None
    html = _markdown().render(show_invisible_characters(text))
    return nh3.clean(
        html, tags=TAGS, attributes=ATTRIBUTES, url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow",
    )  # fmt: skip


@cache
def _markdown() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt(
        "commonmark", {"html": False, "breaks": True, "maxNesting": _NESTING, "inline_definitions": True}
    )
    parser.enable(["table", "strikethrough"])
    parser.inline.ruler.before("escape", "math", _parse_math)
    parser.add_render_rule("math", _render_math)
    parser.add_render_rule("text", lambda _, tokens, index, *__: _escape_visible(tokens[index].content))
    parser.add_render_rule("definition", _render_definition)
    parser.add_render_rule("image", _render_image)
    parser.add_render_rule("link_open", _render_link)
    parser.add_render_rule("link_close", _render_link_end)
    parser.add_render_rule("fence", _render_code)
    parser.add_render_rule("code_block", _render_code)
    parser.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>')
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    return parser


def _parse_math(state: StateInline, silent: bool) -> bool:
    r"""Parse ``\( \)``, ``\[ \]``, ``$$ $$`` and ``$ $``; the last not if it may be an amount of money."""
    source, start = state.src, state.pos
    if source[start] not in "\\$":
        return False
    for opening, closing, display in _MATH_DELIMITERS:
        if not source.startswith(opening, start):
            continue
        begin = start + len(opening)
        end = source.find(closing, begin, begin + TEX_LIMIT)
        tex = source[begin:end] if end >= 0 else ""
        if not tex.strip():
            return False
        after = source[end + 1 : end + 2]
        if opening == "$" and (tex[0].isspace() or tex[-1].isspace() or "\n" in tex or after.isdigit()):
            return False
        if not silent:
            token = state.push("math", "math", 0)
            token.content, token.meta = tex.strip(), {"display": display}
        state.pos = end + len(closing)
        return True
    return False


def _render_math(_: RendererHTML, tokens: Any, index: int, *__: Any) -> str:
    from latex2mathml.converter import convert

    tex, display = tokens[index].content, tokens[index].meta["display"]
    source_html = f'<code class="tex">{_escape(tex)}</code>'
    if _TEX_DEFINITION.search(tex):  # a few nested definitions can expand beyond all memory
        return source_html
    try:
        return str(convert(tex, display="block" if display else "inline"))
    except Exception:  # the converter raises many kinds of errors: show the source instead
        return source_html


def _render_image(_: RendererHTML, tokens: Any, index: int, *__: Any) -> str:
    token = tokens[index]
    address, title = _escape_visible(str(token.attrGet("src") or "")), _format_title(token.attrGet("title"))
    return f'<span class="image">[image: {_escape_visible(token.content)}{title}] <code>{address}</code></span>'


def _render_definition(_: RendererHTML, tokens: Any, index: int, *__: Any) -> str:
    """Show a link definition as text: possibly no link uses its name."""
    definition = tokens[index].meta
    return f"<p>{_escape_visible('[{label}]: {url}'.format(**definition))}{_format_title(definition['title'])}</p>\n"


def _format_title(title: Any) -> str:
    return f" &quot;{_escape_visible(str(title))}&quot;" if title else ""


def _render_link(_: RendererHTML, tokens: Any, index: int, *__: Any) -> str:
    href = str(tokens[index].attrGet("href") or "")
    return f'<a href="{_escape(href)}" target="_blank">' if _link_host(href) else ""


def _render_link_end(_: RendererHTML, tokens: Any, index: int, *__: Any) -> str:
    opening = next(token for token in reversed(tokens[:index]) if token.type == "link_open")
    href = str(opening.attrGet("href") or "")
    host = _link_host(href)
    end = "</a>" if host else ""
    return f'{end} <span class="host">({_escape_visible(host or href)}{_format_title(opening.attrGet("title"))})</span>'


def _link_host(href: str) -> str | None:
    """Return the host (or mail address) of a link, or None if it is not an external link: then it is text."""
    try:
        parts = urlsplit(href)
        return (
            (parts.hostname or (parts.path if parts.scheme == "mailto" else None)) if parts.scheme in SCHEMES else None
        )
    except ValueError:
        return None


def _render_code(_: RendererHTML, tokens: Any, index: int, *__: Any) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import TextLexer, get_lexer_by_name
    from pygments.util import ClassNotFound

    token = tokens[index]
    info = (token.info or "").strip()
    language = info.split()[0] if info else ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False) if language else TextLexer(stripnl=False)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False)
    body = highlight(token.content, lexer, HtmlFormatter(nowrap=True))
    label = f'<span class="language">{_escape_visible(info)}</span>' if info else ""
    return f'<pre class="code" tabindex="0">{label}<code>{body}</code></pre>\n'


def _escape_visible(text: str) -> str:
    """Escape text for HTML. An entity may have produced invisible characters, so show those again."""
    return _escape(show_invisible_characters(text))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")

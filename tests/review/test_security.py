"""Attacks on the review page: hostile answers, other sites, DNS rebinding, users without a link."""

from __future__ import annotations

import http.client
import json
import os
import stat
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.config.models import ReviewConfig
from rlaif.installation import install_command
from rlaif.review.annotators import SECRET_FILE, load_registry
from rlaif.run.run import Run
from rlaif.web.markdown import MARKDOWN_LIMIT, markdown_to_safe_html, show_invisible_characters
from rlaif.web.security import HEADERS
from tests.conftest import command, needs, read_jsonl
from tests.review_client import CHROMIUM, FLAGS, PageServer, judged_run, needs_browser, prompt_rows

HOSTILE = """# good
<script>document.title = "owned"; fetch("/api/next")</script>
<img src="http://203.0.113.9/beacon.png" onerror="document.title='owned'">
![beacon](http://203.0.113.9/pixel.png "t") ![local](/favicon.ico)
[click](javascript:document.title='owned') [data](data:text/html,<script>alert(1)</script>)
<a href="vbscript:x">v</a> <iframe src="//203.0.113.9"></iframe> <form action="/api/label" method="post">
<style>body{display:none}</style> <math><mtext><script>document.title='owned'</script></mtext></math>
<svg onload="document.title='owned'"> $\\href{javascript:alert(1)}{x}$ $\\text{<img src=x onerror=alert(1)>}$
```"><script>document.title='owned'</script>
code </pre><script>document.title='owned'</script>
```
\u202egnp.exe\u202c \x1b[31mred\x1b[0m \u2066isolated\u2069 zero\u200bwidth \U000e0041tag
[x]: http://203.0.113.9/ "onmouseover=alert(1)"
<http://203.0.113.9/auto> {{ 7 * 7 }} </textarea></script><!-- -->
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    hostile = {"prompt": f"Hostile? {HOSTILE}", "responses": [HOSTILE, "x" * 1_000_000]}
    return judged_run(tmp_path_factory.mktemp("hostile") / "run", [hostile, *prompt_rows(40)])


@pytest.fixture(scope="module")
def page(run: Run) -> Iterator[PageServer]:
    with PageServer(run.path, "--annotator", "ada") as server:
        yield server


def csrf_of(html: str) -> str:
    return html.partition('name="csrf" content="')[2].partition('"')[0]


# Hostile answers


def test_hostile_answer_does_nothing(run: Run) -> None:
    """No script runs, no request goes elsewhere, nothing is hidden; a megabyte of text opens and can be labeled."""
    needs("playwright")
    needs_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, PageServer(run.path, "--annotator", "eve") as server:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = chromium.new_page()
        requested_urls: list[str] = []
        console_messages: list[str] = []
        tab.on("request", lambda request: requested_urls.append(request.url))
        tab.on("console", lambda message: console_messages.append(message.text))
        tab.goto(server.links["eve"])
        tab.wait_for_selector("#pair:not([hidden])")
        while "Hostile?" not in tab.inner_text("#prompt"):
            before = tab.inner_text("#prompt")
            tab.keyboard.press("s")
            tab.wait_for_function("before => document.getElementById('prompt').innerText !== before", arg=before)
        answers = tab.inner_text("#answers")
        for text in ("[U+202E]", "␛[31m", "[U+2066]", "[U+200B]", "[U+E0041]", "<script>document.title", "pixel.png"):
            assert text in answers
        assert "Show the remaining 900,000 characters" in answers
        tab.click("text=Show the remaining")
        assert tab.locator("pre.plain").inner_text().count("x") == 1_000_000
        for key in ("d", "r", "r"):
            tab.keyboard.press(key)
        assert tab.locator("#pair img, #pair iframe, #pair form, #pair svg, #pair script, #pair style").count() == 0
        hrefs = tab.eval_on_selector_all("#pair a", "links => links.map(link => link.protocol)")
        assert hrefs
        assert set(hrefs) <= {"http:", "https:", "mailto:"}
        tab.keyboard.press("ArrowLeft")
        tab.wait_for_function("() => !document.getElementById('prompt').innerText.includes('Hostile?')")
        assert "owned" not in tab.title()
        assert {urllib.parse.urlsplit(url).port for url in requested_urls} == {server.port}
        assert console_messages == []
        # If markup ever passed the sanitizer, the policy would still stop it.
        tab.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://203.0.113.9/x.png'}))")
        with pytest.raises(Exception, match="TrustedHTML"):
            tab.evaluate("document.body.innerHTML = '<b>x</b>'")
        assert any("Content Security Policy" in line for line in console_messages)
        chromium.close()


ALPHABET = st.sampled_from(
    [*"<>\"'&`[]()!$\\{}*_#|~-:/ \n\tax1", "<script>", "javascript:", "onerror=", "\u202e", "```"]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ALPHABET, max_size=60).map("".join))
def test_no_text_becomes_active_markup(text: str) -> None:
    from html.parser import HTMLParser

    class MarkupChecker(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "img", "iframe", "form", "svg", "style", "object", "link", "meta", "base")
            for name, value in attributes:
                assert not name.startswith("on")
                assert name != "style"
                if name == "href":
                    assert str(value).split(":")[0].lower() in ("http", "https", "mailto")

    MarkupChecker().feed(markdown_to_safe_html(text) or "")


@pytest.mark.parametrize("href", ["", "/lead/", "//evil.example", "../x", "?y", "javascript:x", "http:", "x y"])
def test_link_that_is_not_external_is_text(href: str) -> None:
    html = markdown_to_safe_html(f"[here](<{href}>)") or ""
    assert "<a" not in html
    assert "here" in html


def test_host_of_a_link_is_shown() -> None:
    html = markdown_to_safe_html("[your bank](https://evil.example/login) <a@b.example>") or ""
    assert '>your bank</a> <span class="host">(evil.example)</span>' in html
    assert html.count('rel="noopener noreferrer nofollow"') == 2


def test_only_invisible_characters_are_replaced() -> None:
    plain = "Grüße, 你好, שלום, 👩\u200d🚀, x\ty\n"
    assert show_invisible_characters(plain) == plain
    assert show_invisible_characters("a\r\nb\x07\x9b\u2028") == "a\nb␇[U+009B]\u2028"
    assert markdown_to_safe_html("x" * (MARKDOWN_LIMIT + 1)) is None


@pytest.mark.parametrize("nest", ["- ", "> ", ">", "1. ", "* > "])
@pytest.mark.parametrize("depth", [5, 19, 20, 60, 200])
def test_nesting_hides_nothing(nest: str, depth: int) -> None:
    """Text that the parser would drop is shown as plain text."""
    text = nest * depth + "at the bottom"
    assert "at the bottom" in (markdown_to_safe_html(text) or text)
    assert depth > 5 or markdown_to_safe_html(text)


@pytest.mark.parametrize(
    "text",
    [
        "[1]: https://e.example 'hidden words'",
        "[used][1]\n\n[1]: https://e.example 'hidden words'\n[1]: https://e.example/again",
        "> [hidden words]: <https://e.example>",
        "- [1]: https://e.example/<b>\n  'hidden words'",
        "```python hidden words\nx = 1\n```",
        "~~~ hidden words\nx\n~~~",
        "[link](https://e.example 'hidden words')",
        "![image](https://e.example/x.png 'hidden words')",
    ],
)
def test_text_that_markdown_hides_is_shown(text: str) -> None:
    """Markup in such text is escaped too."""
    assert "hidden words" in (markdown_to_safe_html(text) or "")
    html = markdown_to_safe_html(text.replace("hidden words", "<img src=x>")) or ""
    assert "&lt;img src=x&gt;" in html
    assert "<img" not in html


def test_link_definition_is_shown() -> None:
    html = markdown_to_safe_html("[here][1]\n\n[1]: https://e.example/far 'A title'") or ""
    assert '>here</a> <span class="host">(e.example "A title")</span></p>' in html.replace("&quot;", '"')
    assert '<p>[1]: https://e.example/far "A title"</p>' in html.replace("&quot;", '"')


def test_invisible_characters_from_entities_are_shown() -> None:
    assert markdown_to_safe_html("a&#x202e;b&ZeroWidthSpace;c &amp;lt;") == "<p>a[U+202E]b[U+200B]c &amp;lt;</p>\n"


# Other sites


def test_every_reply_has_the_security_headers(page: PageServer) -> None:
    for path in ("/", "/static/annotate.js", "/api/next", "/nothing", "/static/../web_app.py", "/lead/", "/p/guess/"):
        _, _, headers = page.request(path)
        assert {name: headers.get(name) for name in HEADERS} == HEADERS, path
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    html = page.request("/")[1]
    assert "<script>" not in html
    assert "style=" not in html
    assert "http://" not in html.replace(f"http://127.0.0.1:{page.port}", "")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "localhost.evil", "[::1", "a@b"]
)
def test_foreign_host_name_is_rejected(page: PageServer, host: str) -> None:
    assert page.request("/api/next", Host=host)[0] in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:9", "LOCALHOST:8000"])
def test_tunnel_may_use_another_port(page: PageServer, host: str) -> None:
    assert page.request("/api/next?tab=t&count=1", Host=host)[0] == 200


def test_other_sites_can_neither_read_nor_write(run: Run, page: PageServer) -> None:
    token = csrf_of(page.request("/")[1])
    pair = page.request("/api/next?tab=x")[1]["items"][0]["id"]
    label = {"id": pair, "choice": "left"}
    before = run.reviews().height
    own_origin = f"http://127.0.0.1:{page.port}"
    for status, headers in (
        (403, {"Origin": "http://evil.example", "X_CSRF_Token": token}),
        (403, {"Origin": "null", "X_CSRF_Token": token}),
        (403, {"Origin": f"http://localhost:{page.port}", "X_CSRF_Token": token}),
        (403, {"Origin": own_origin, "X_CSRF_Token": token, "Sec_Fetch_Site": "cross-site"}),
        (403, {"Origin": own_origin, "X_CSRF_Token": token, "Sec_Fetch_Site": "same-site"}),
        (403, {"Origin": own_origin}),
        (403, {"Origin": own_origin, "X_CSRF_Token": token[:-1] + "x"}),
        (403, {"Origin": own_origin, "X_CSRF_Token": csrf_of(page.request("/lead/")[1])}),
        (415, {"Origin": own_origin, "X_CSRF_Token": token, "Content_Type": "text/plain"}),
        (415, {"Origin": own_origin, "X_CSRF_Token": token, "Content_Type": "application/x-www-form-urlencoded"}),
    ):
        assert page.request("/api/label", label, **headers)[0] == status, headers
    assert page.request("/api/dashboard", Sec_Fetch_Site="cross-site")[0] == 403
    assert run.reviews().height == before
    # The page's own request is accepted, and repeating it changes nothing.
    for saved in ("added", "unchanged"):
        status, answer, _ = page.request(
            "/api/label", label, Origin=own_origin, X_CSRF_Token=token, Sec_Fetch_Site="same-origin"
        )
        assert (status, answer["saved"]) == (200, saved)
    assert run.reviews().height == before + 1


@pytest.mark.parametrize(
    "body",
    [{}, [], "x", {"id": "no-such-pair", "choice": "left"}, {"id": 1, "choice": "left"}, {"id": "p", "choice": "best"},
     {"id": "p", "choice": "left", "confidence": 9}, {"id": "p", "choice": "left", "seconds": -1},
     {"id": "p", "choice": "left", "route": "judge"}, {"id": "p", "choice": "left", "annotator": "bob"}],
)  # fmt: skip
def test_invalid_label_is_rejected_with_a_message(run: Run, page: PageServer, body: Any) -> None:
    before = run.reviews().height
    status, answer, _ = page.request("/api/label", body, X_CSRF_Token=csrf_of(page.request("/")[1]))
    assert status == 422
    assert answer["error"]
    assert run.reviews().height == before


def raw(port: int, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_methods_sizes_and_paths(page: PageServer) -> None:
    json_type = {"Content-Type": "application/json"}
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert raw(page.port, method, "/api/label", {}) == 405
    assert raw(page.port, "POST", "/api/label", {**json_type, "Content-Length": str(1 << 30)}) == 413
    assert raw(page.port, "POST", "/api/label", {**json_type, "Transfer-Encoding": "chunked"}) == 411
    for path in ("/static/../web_app.py", "/static/%2e%2e/web_app.py", "/static/..%2fweb_app.py", "/static//etc/passwd",
                 "/static/%2fetc/passwd", "/static/..\\web_app.py", "/static/annotate.html", "/static/"):  # fmt: skip
        assert raw(page.port, "GET", path, {}) == 404, path


# Users without a link


def test_if_links_are_required_nothing_opens_without_one(run: Run) -> None:
    with PageServer(run.path, "--annotators", "ada,bob") as server:
        for path in ("/", "/lead/", "/adjudicate", "/lead/adjudicate", "/p/x/", f"/p/{'A' * 24}/", "/p/%00/"):
            status, html, _ = server.request(path)
            assert status in (403, 404), path
            assert "csrf" not in html or csrf_of(html) == ""
        for path in ("/api/next", "/lead/api/next", "/api/dashboard", "/lead/api/dashboard", "/p/x/api/next"):
            assert server.request(path)[0] == 403
        ada = server.links["ada"]
        assert server.request(f"{ada}api/next?tab=t")[0] == 200
        assert server.request(f"{ada}api/dashboard")[0] == 403, "only the lead sees the dashboard"
        assert server.request(f"{ada}adjudicate")[0] == 403
        assert server.request(f"{server.links['lead']}api/dashboard")[0] == 200
        token = csrf_of(server.request(ada)[1])
        pair = server.request(f"{ada}api/next?tab=t")[1]["items"][0]["id"]
        bob = f"{server.links['bob']}api/label"
        assert server.request(bob, {"id": pair, "choice": "left"}, X_CSRF_Token=token)[0] == 403


def test_tokens_are_long_and_stable_and_the_secret_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ReviewConfig(annotators=["ada", "bob"])
    registry = load_registry(tmp_path, config, annotator=None, links=True)
    again = load_registry(tmp_path, config, annotator=None, links=True)
    tokens = [registry.link_token(annotator) for annotator in (*registry.annotators, registry.lead)]
    assert len(set(tokens)) == 3
    assert all(len(token) == 24 for token in tokens)
    assert [again.link_token(annotator) for annotator in (*again.annotators, again.lead)] == tokens
    assert stat.S_IMODE((tmp_path / SECRET_FILE).stat().st_mode) == 0o600
    # Compared with every annotator's token in constant time, whichever matches.
    compared = []
    monkeypatch.setattr("rlaif.review.annotators.hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    assert registry.find_by_token(tokens[0]) == registry.annotators[0]
    assert registry.find_by_token("é") is None
    assert len(compared) == 6
    (tmp_path / SECRET_FILE).unlink()
    assert load_registry(tmp_path, config, annotator=None, links=True).link_token(registry.lead) not in tokens


def test_beyond_this_machine_links_are_required(run: Run) -> None:
    with PageServer(run.path, "--annotator", "ada", "--host", "0.0.0.0") as server:
        assert "/p/" in server.links["ada"]
        assert server.request("/")[0] == 403
    assert "not encrypted" in server.stderr


@pytest.mark.parametrize("package", ["starlette", "nh3", "latex2mathml"])
def test_missing_package_is_named_with_the_install_command(run: Run, tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no', name={package!r})")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(command("review", run.path, "--port", "0"), capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert done.returncode == 4
    assert f"the review page needs {package}" in done.stderr
    assert f"Run `{install_command('review')}`" in done.stderr
    assert "Traceback" not in done.stderr


def test_browser_receives_nothing_that_identifies_an_answer(page: PageServer) -> None:
    """Before the choice the browser gets no model, judge, route, completion key or side."""
    items = page.request("/api/next?tab=blind")[1]["items"]
    assert items
    for item in items:
        assert set(item) == {"id", "turns", "left", "right"}
        assert set(item["left"]) == {"text", "html"}
    text = json.dumps(items)
    for secret in ("prob_a", "audit", "targeted", "completion", "judge", "preferred"):
        assert secret not in text.replace("Hostile", "")


def test_labels_record_annotator_and_role(run: Run) -> None:
    for label in read_jsonl(run.journal_path("reviews")):
        assert label["annotator"] in ("ada", "eve")
        assert label["role"] == "annotator"

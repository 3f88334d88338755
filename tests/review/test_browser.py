"""The review page in a real Chromium, started by the real command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rlaif.records import hash_to_unit_interval
from rlaif.run.run import Run
from tests.conftest import needs, read_jsonl
from tests.review_client import AXE, CHROMIUM, FLAGS, PageServer, judged_run, needs_browser, prompt_rows

KEYS = ["ArrowLeft", "ArrowRight", "t", "b", "ArrowLeft", "s"]
CHOICES = {"ArrowLeft": "left", "ArrowRight": "right", "t": "tie", "b": "both_bad", "s": "skip"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    needs("playwright")
    needs_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Tab:
    """A tab of one annotator. Tests assert that its console stays empty."""

    def __init__(self, context: Any, link: str) -> None:
        self.page = context.new_page()
        self.console_messages: list[str] = []
        self.page.on("console", lambda message: self.console_messages.append(message.text))
        self.page.on("pageerror", lambda error: self.console_messages.append(str(error)))
        self.open(link)

    def open(self, link: str) -> None:
        self.page.goto(link)
        self.wait_until_loaded()

    def wait_until_loaded(self) -> None:
        self.page.wait_for_selector("#pair:not([hidden]), #empty:not([hidden])")

    @property
    def prompt(self) -> str:
        return str(self.page.inner_text("#prompt"))

    def side(self, name: str) -> str:
        return str(self.page.inner_text(f"#{name} .text"))

    @property
    def is_over(self) -> bool:
        return bool(self.page.is_visible("#empty"))

    def choose(self, key: str) -> None:
        """Press a key and wait for the next pair."""
        before = self.prompt
        self.page.keyboard.press(key)
        self.page.wait_for_function(
            "before => document.getElementById('prompt').innerText !== before"
            " || !document.getElementById('empty').hidden", arg=before,
        )  # fmt: skip


def tab(browser: Any, link: str, **options: Any) -> Tab:
    return Tab(browser.new_context(**options), link)


def reviews(run: Run) -> list[dict[str, Any]]:
    return read_jsonl(run.journal_path("reviews")) if run.journal_path("reviews").exists() else []


def choices_by_prompt(run: Run) -> dict[str, tuple[str, str | None]]:
    """Return by prompt the choice and the text of the preferred answer."""
    pairs = {row["pair_id"]: row for row in run.pairs().iter_rows(named=True)}
    choices = {}
    for label in reviews(run):
        row, side = pairs[label["pair_id"]], label.get("preferred")
        choices[json.loads(row["prompt"])[-1]["content"]] = (label["choice"], row[f"response_{side}"] if side else None)
    return choices


def test_fifty_pairs_by_keyboard_with_a_server_crash(browser: Any, tmp_path: Path, rlaif: Any) -> None:
    """Every key press is one label, none is duplicated, and the dataset contains exactly the chosen answers."""
    run = judged_run(tmp_path / "run", prompt_rows(50))
    pressed: dict[str, tuple[str, str | None]] = {}
    server = PageServer(run.path, "--annotator", "ada")
    annotator = tab(browser, server.links["ada"])

    def press(key: str) -> None:
        choice = CHOICES[key]
        pressed[annotator.prompt] = (choice, annotator.side(choice) if choice in ("left", "right") else None)
        annotator.choose(key)

    for number in range(20):
        press(KEYS[number % len(KEYS)])
    server.kill()
    # The server is down: the page reports it, keeps the choice, and stays on the pair.
    current_prompt = annotator.prompt
    pressed[current_prompt] = ("left", annotator.side("left"))
    annotator.page.keyboard.press("ArrowLeft")
    annotator.page.wait_for_selector("#error:not([hidden])")
    assert annotator.prompt == current_prompt
    assert len(reviews(run)) == 20
    with PageServer(run.path, "--annotator", "ada", port=server.port):
        annotator.page.wait_for_function(
            "before => document.getElementById('prompt').innerText !== before", arg=current_prompt
        )
        assert annotator.page.is_hidden("#error")
        for number in range(21, 50):
            press(KEYS[number % len(KEYS)])
        assert annotator.is_over
        assert "50 pairs" in annotator.page.inner_text("#empty-text")
    assert [message for message in annotator.console_messages if "net::ERR_" not in message] == []
    assert len(reviews(run)) == len({label["pair_id"] for label in reviews(run)}) == 50
    rendered = {
        prompt: (choice, text.replace("**", "") if text else None)
        for prompt, (choice, text) in choices_by_prompt(run).items()
    }
    assert rendered == pressed
    rlaif("review", run.path, "--merge")
    data = pl.concat(pl.read_parquet(run.dataset / f"{name}.parquet") for name in ("train", "test"))
    assert set(data["label_source"]) == {"human"}
    chosen = {
        row["prompt"][-1]["content"]: row["chosen"][0]["content"].replace("**", "")
        for row in data.iter_rows(named=True)
    }
    assert chosen == {prompt: text for prompt, (choice, text) in pressed.items() if choice in ("left", "right")}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return judged_run(tmp_path_factory.mktemp("judged") / "run", prompt_rows(30))


@pytest.fixture
def run(judged: Run) -> Iterator[Run]:
    """The judged run without labels."""
    yield judged
    judged.journal_path("reviews").unlink(missing_ok=True)


def test_typed_text_survives_reload_back_and_undo(browser: Any, run: Run) -> None:
    with PageServer(run.path, "--annotator", "ada") as server:
        ada = tab(browser, server.links["ada"])
        first, keys = ada.prompt, ada.page.keyboard
        keys.press("c")
        keys.type("left out the year: a t b s 1")  # keys typed into a field do not choose
        keys.press("Escape")
        keys.press("e")
        keys.type("A better answer,\nin two lines.")
        keys.press("Escape")
        keys.press("3")
        ada.page.reload()
        ada.wait_until_loaded()
        ada.page.goto("about:blank")
        ada.page.go_back()
        ada.wait_until_loaded()
        assert ada.prompt == first
        assert ada.page.input_value("#comment") == "left out the year: a t b s 1"
        assert ada.page.input_value("#edited") == "A better answer,\nin two lines."
        assert reviews(run) == []
        ada.choose("ArrowRight")
        second = ada.prompt
        label = reviews(run)[0]
        assert (label["choice"], label["confidence"], label["edited_response"]) == (
            "right",
            3,
            "A better answer,\nin two lines.",
        )
        assert ada.page.input_value("#comment") == ""
        # Undo shows the earlier label, and another choice replaces it.
        ada.choose("u")
        assert ada.prompt == first
        assert ada.page.input_value("#comment") == "left out the year: a t b s 1"
        assert ada.page.get_attribute("[data-choice=right]", "aria-pressed") == "true"
        ada.choose("ArrowLeft")
        assert ada.prompt == second
        ada.choose("u")
        ada.choose("n")  # next, without a new label
        assert ada.prompt == second
        assert [label["choice"] for label in reviews(run)] == ["right", "left"]
        assert ada.console_messages == []


def test_judges_verdict_is_shown_only_after_the_choice(browser: Any, run: Run) -> None:
    with PageServer(run.path, "--annotator", "ada") as server:
        ada = tab(browser, server.links["ada"])
        ada.page.keyboard.press("j")
        assert ada.page.is_hidden("#verdict")
        left_is_good = "good" in ada.side("left")
        ada.choose("t")
        ada.page.keyboard.press("j")
        assert ada.page.inner_text("#verdict").startswith(
            f"Previous pair: the judges preferred the {'left' if left_is_good else 'right'} answer (p = 0.90)."
        )
        ada.page.keyboard.press("g")
        assert "careful person would rather have received" in ada.page.inner_text("#guidelines")
        ada.page.keyboard.press("Escape")
        ada.page.keyboard.press("r")
        assert "**good**" in ada.side("left") + ada.side("right")
        ada.page.keyboard.press("d")
        assert ada.page.evaluate("CSS.highlights.get('differs').size") > 0
        ada.page.keyboard.press("?")
        assert ada.page.is_visible("#keys")
        assert ada.console_messages == []


def test_everything_works_by_mouse(browser: Any, run: Run) -> None:
    with PageServer(run.path, "--annotator", "ada") as server:
        ada = tab(browser, server.links["ada"])
        left = ada.side("left")
        for name in ("[data-confidence='2']", "#edit-button", "#from-left"):
            ada.page.click(name)
        assert ada.page.input_value("#edited").replace("**", "") == left
        ada.page.fill("#edited", "Mine.")
        ada.page.click("#edit-done")
        ada.page.click("[data-choice=both_bad]")
        ada.page.wait_for_function("() => document.getElementById('edited').value === ''")
        label = reviews(run)[0]
        assert (label["choice"], label["confidence"], label["edited_response"]) == ("both_bad", 2, "Mine.")
        for name in (
            "#undo",
            "#forward",
            "#comment-button",
            "#diff",
            "#raw",
            "#guidelines-button",
            "#guidelines-close",
            "#judge",
            "#help",
        ):
            ada.page.click(name)
            ada.page.wait_for_timeout(50)
        ada.page.click("#keys-close")
        assert ada.console_messages == []


def test_two_annotators_and_two_tabs_share_the_queue_without_duplicates(browser: Any, run: Run) -> None:
    """Without extra labels each pair goes to one annotator; all three tabs are empty when all pairs have one label."""
    (run.path / "rlaif.toml").write_text("[review]\nextra_label_fraction = 0\ngold_fraction = 0\n")
    try:
        with PageServer(run.path, "--annotators", "ada,bob") as server:
            ada_context = browser.new_context()
            tabs = [
                Tab(ada_context, server.links["ada"]),
                Tab(ada_context, server.links["ada"]),
                tab(browser, server.links["bob"]),
            ]
            prompts = []
            assert len({annotator.prompt for annotator in tabs}) == 3
            while not all(annotator.is_over for annotator in tabs):
                for annotator in tabs:
                    if not annotator.is_over:
                        prompts.append(annotator.prompt)
                        annotator.choose("ArrowLeft")
            assert len(prompts) == len(set(prompts)) == 30
            assert {label["annotator"] for label in reviews(run)} == {"ada", "bob"}
            assert [annotator.console_messages for annotator in tabs] == [[], [], []]
    finally:
        (run.path / "rlaif.toml").unlink()


def test_overlap_gold_agreement_and_adjudication(browser: Any, run: Run) -> None:
    (run.path / "rlaif.toml").write_text("[review]\nextra_label_fraction = 0.4\ngold_fraction = 0.2\n")
    double = {pair for pair in run.pairs()["pair_id"] if hash_to_unit_interval(0, "overlap", pair) < 0.4}
    try:
        with PageServer(run.path, "--annotators", "ada,bob") as server:
            for name in ("ada", "bob"):
                annotator = tab(browser, server.links[name])
                while not annotator.is_over:
                    good = next(side for side in ("left", "right") if "good" in annotator.side(side) or side == "right")
                    wants = good if name == "ada" else "left" if good == "right" else "right"
                    annotator.choose("ArrowLeft" if wants == "left" else "ArrowRight")
                assert annotator.console_messages == []
            labelers: dict[str, set[str]] = {}
            for label in reviews(run):
                if label["route"] != "gold":
                    labelers.setdefault(label["pair_id"], set()).add(label["annotator"])
            assert {pair for pair, names in labelers.items() if len(names) == 2} == double
            assert len(labelers) == 30
            gold = [label for label in reviews(run) if label["route"] == "gold"]
            assert gold
            lead = browser.new_context().new_page()
            lead.goto(server.links["lead"])
            lead.wait_for_selector("#kappas td")
            assert f"{len(double)} (0 adjudicated)" in lead.inner_text("#figures")
            assert "ada and bob" in lead.inner_text("#kappas")
            assert lead.inner_text("#annotators").count("(n = ") == 2  # gold accuracy of both
            lead.click("#adjudicate")
            lead.wait_for_selector("#votes li")
            assert {"ada", "bob"} == set(lead.locator("#votes b").all_inner_texts())
            for _ in double:
                before = lead.inner_text("#prompt")
                lead.keyboard.press("ArrowLeft")
                lead.wait_for_function("before => document.getElementById('prompt').innerText !== before"
                                       " || !document.getElementById('empty').hidden", arg=before)  # fmt: skip
            assert lead.is_visible("#empty")
            assert sum(label["role"] == "adjudicator" for label in reviews(run)) == len(double)
    finally:
        (run.path / "rlaif.toml").unlink()


@pytest.mark.parametrize(
    "options",
    [
        {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
        {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
        {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "is_mobile": True, "has_touch": True},
    ],
    ids=["light", "dark", "phone"],
)
def test_no_serious_accessibility_violation(browser: Any, run: Run, options: dict[str, Any]) -> None:
    """Run axe-core on the page as it opens, with all panels open, and on the lead's dashboard."""
    with PageServer(run.path, "--annotator", "ada") as server:
        # axe is a foreign script, which the page's policy rejects: this test bypasses the policy.
        context = browser.new_context(**options, bypass_csp=True)
        ada = Tab(context, server.links["ada"])

        def check(page: Any, state: str) -> None:
            page.evaluate(AXE.read_text(encoding="utf-8"))
            result = page.evaluate("axe.run(document)")
            serious = [(rule["id"], rule["nodes"][0]["html"][:120]) for rule in result["violations"]
                       if rule["impact"] in ("serious", "critical")]  # fmt: skip
            assert not serious, state
            assert len(result["passes"]) > 10

        check(ada.page, "as it opens")
        ada.choose("ArrowLeft")
        for key in ("c", "Escape", "e", "Escape", "j", "d", "2"):
            ada.page.keyboard.press(key)
        ada.page.click("#comment-button")
        ada.page.click("#edit-button")
        check(ada.page, "unfolded")
        ada.page.keyboard.press("Escape")
        ada.page.click("#guidelines-button")
        check(ada.page, "guidelines")
        ada.page.keyboard.press("Escape")
        ada.page.evaluate("document.getElementById('keys').showModal()")
        check(ada.page, "keys")
        ada.page.goto(server.links["lead"])
        ada.page.wait_for_selector("#annotators td")
        check(ada.page, "the lead's page")
        assert ada.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            "the dashboard does not overflow sideways"
        )


def test_write_error_is_shown_and_the_label_is_sent_again(browser: Any, run: Run) -> None:
    """While the journal cannot be written, the page shows the error; afterwards it resumes by itself."""
    with PageServer(run.path, "--annotator", "ada") as server:
        ada = tab(browser, server.links["ada"])
        path = run.journal_path("reviews")
        path.mkdir()
        current_prompt = ada.prompt
        ada.page.keyboard.press("ArrowLeft")
        ada.page.wait_for_selector("#error:not([hidden])")
        assert "cannot be opened for writing" in ada.page.inner_text("#error")
        assert ada.prompt == current_prompt
        path.rmdir()
        ada.page.wait_for_function(
            "before => document.getElementById('prompt').innerText !== before", arg=current_prompt
        )
        assert len(reviews(run)) == 1


def test_highlighted_words_are_minimal(browser: Any, run: Run) -> None:
    """The words not highlighted are a longest common subsequence, checked against the quadratic table.

    If texts have little in common, a word is highlighted if the other text does not contain it."""
    with PageServer(run.path, "--annotator", "ada") as server:
        ada = tab(browser, server.links["ada"])
        result = ada.page.evaluate("""async () => {
          const { differing } = await import("/static/differences.js");
          let seed = 1;
          const draw = (n) => ((seed = (seed * 48271) % 2147483647) % n);
          const words = () => Array.from({ length: draw(12) }, () => "abcd"[draw(4)]);
          const longest = (a, b) => {
            const t = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
            for (let i = 1; i <= a.length; i++) for (let j = 1; j <= b.length; j++)
              t[i][j] = a[i - 1] === b[j - 1] ? t[i - 1][j - 1] + 1 : Math.max(t[i - 1][j], t[i][j - 1]);
            return t[a.length][b.length];
          };
          const wrong = [];
          for (let n = 0; n < 2000; n++) {
            const [a, b] = [words(), words()];
            const [inA, inB] = differing(a, b);
            const [keptA, keptB] = [a.filter((_, at) => !inA[at]), b.filter((_, at) => !inB[at])];
            if (keptA.join() !== keptB.join() || keptA.length !== longest(a, b)) wrong.push([a, b]);
          }
          const many = (from) => Array.from({ length: 5000 }, (_, at) => `w${from + at}`);
          const [far] = differing(["same", ...many(0), "shared"], ["same", ...many(9000), "shared", "end"]);
          return { wrong, marked: far.reduce((sum, flag) => sum + flag, 0) };
        }""")
        assert result == {"wrong": [], "marked": 5000}

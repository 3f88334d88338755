"""``rlaif review`` as a command: invalid options, and its messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlaif.run.run import Run
from tests.review_client import PageServer, judged_run, prompt_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return judged_run(tmp_path_factory.mktemp("command") / "run", prompt_rows(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--merge", "--export", "x.csv"], "exclude each other"),
        (["--annotator", "ada", "--annotators", "bob"], "exclude each other"),
        (["--annotators", "ada,ada"], "must differ"),
        (["--annotators", "ada,lead"], "must differ"),
        (["--port", "9", "--merge"], "apply to the review page only"),
        (["--annotator", " "], "name is empty"),
        (["--host", "203.0.113.1", "--port", "0"], "cannot listen on 203.0.113.1"),
    ],
)
def test_invalid_options_are_rejected(run: Run, rlaif: Any, options: list[str], message: str) -> None:
    assert message in rlaif("review", run.path, *options, code=2).stderr


def test_run_without_pairs_has_no_page(tmp_path: Path, rlaif: Any) -> None:
    (tmp_path / "rlaif.toml").touch()
    assert "rlaif judge" in rlaif("review", tmp_path, code=2).stderr


def test_port_in_use_is_named(run: Run, rlaif: Any) -> None:
    with PageServer(run.path) as server:
        stderr = rlaif("review", run.path, "--port", str(server.port), code=2).stderr
    assert f"cannot listen on 127.0.0.1 port {server.port}" in stderr
    assert "--port N" in stderr


def test_open_page_blocks_no_other_command_and_the_dataset_follows_the_labels(run: Run, rlaif: Any) -> None:
    """Merge while the page is open, and again after another label; the dataset card is updated too."""
    with PageServer(run.path, "--annotator", "ada") as server:
        csrf = re.search('name="csrf" content="([^"]+)"', server.request("/")[1])[1]  # type: ignore[index]
        items = server.request("/api/next?tab=t&count=3")[1]["items"]
        for number, item in enumerate(items, 1):
            label = {"id": item["id"], "choice": "left", "edited_response": "Mine." if number == 3 else None}
            assert server.request("/api/label", label, X_CSRF_Token=csrf)[0] == 200
            if number != 2:
                result = rlaif("review", run.path, "--merge")
                assert f"{8 - number} await review" in result.stdout
        assert "written by an annotator" in result.stderr
        assert "| annotators | 3 |" in (run.dataset / "README.md").read_text(encoding="utf-8")
    assert "3 new labels" in server.stderr

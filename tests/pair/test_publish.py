"""`rlaif export --to`: to a real S3 server, and to a stand-in for the Hugging Face Hub."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from aiohttp import web

from rlaif.run import object_storage
from tests.fake_server import ScriptedServer
from tests.run.test_object_storage import s3, store  # noqa: F401  # fixtures
from tests.train.pairs import rows

Cli = Callable[..., subprocess.CompletedProcess[str]]
CARD = "---\ntags: [preference]\n---\n\n# Preference dataset\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    dataset = tmp_path / "run" / "dataset"
    dataset.mkdir(parents=True)
    (tmp_path / "run" / "journal").mkdir()
    pl.DataFrame(rows(16)).write_parquet(dataset / "train.parquet")
    pl.DataFrame(rows(4, first=16)).write_parquet(dataset / "test.parquet")
    (dataset / "README.md").write_text(CARD)
    (dataset / ".train.parquet.99").write_text("half of one")
    return tmp_path / "run"


def test_to_object_storage_and_back(s3: str, run: Path, tmp_path: Path, rlaif: Cli) -> None:
    result = rlaif("export", run, "--to", f"{s3}/v1/")
    assert result.stdout.split() == [f"{s3}/v1/{name}" for name in ("README.md", "test.parquet", "train.parquet")]
    with object_storage.open_remote(f"{s3}/v1/train.parquet") as file:
        assert pl.read_parquet(file).equals(pl.read_parquet(run / "dataset" / "train.parquet"))
    with object_storage.open_remote(f"{s3}/v1/README.md") as file:
        assert file.read().decode() == CARD
    result = rlaif("export", run, "--to", f"{s3}/axolotl", "--format", "axolotl")
    assert f"{s3}/axolotl/train.jsonl" in result.stdout


class Hub(ScriptedServer):
    """The four requests of an upload. Files are sent within the commit, as the hub does with small ones."""

    def routes(self, app: web.Application) -> None:
        self.created: list[dict[str, Any]] = []
        self.commits: list[list[dict[str, Any]]] = []
        self.tokens: set[str | None] = set()
        app.router.add_post("/api/repos/create", self.create)
        app.router.add_post("/api/validate-yaml", self.valid)
        app.router.add_post("/api/datasets/me/pairs/preupload/main", self.preupload)
        app.router.add_post("/api/datasets/me/pairs/commit/main", self.commit)

    async def create(self, request: web.Request) -> web.Response:
        self.tokens.add(request.headers.get("Authorization"))
        self.created.append(await request.json())
        return web.json_response({"url": f"http://127.0.0.1:{self.port}/datasets/me/pairs", "id": "me/pairs"})

    async def valid(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def preupload(self, request: web.Request) -> web.Response:
        files = (await request.json())["files"]
        return web.json_response(
            {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        )

    async def commit(self, request: web.Request) -> web.Response:
        self.tokens.add(request.headers.get("Authorization"))
        lines = (await request.text()).splitlines()
        self.commits.append([json.loads(line) for line in lines])
        url = f"http://127.0.0.1:{self.port}/datasets/me/pairs/commit/1"
        return web.json_response(
            {"commitUrl": url, "commitOid": "1", "pullRequestUrl": None, "success": True, "hookOutput": ""}
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


def test_the_hub_gets_the_dataset_and_its_card(hub: Hub, run: Path, rlaif: Cli) -> None:
    result = rlaif("export", run, "--to", "hf:me/pairs")
    assert "me/pairs" in result.stdout
    assert "hf_secret" not in result.stdout + result.stderr
    (created,) = hub.created
    assert (created["name"], created["organization"], created["type"]) == ("pairs", "me", "dataset")
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    (commit,) = hub.commits
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit if line["key"] == "file"
    }
    assert set(sent) == {"README.md", "train.parquet", "test.parquet"}
    assert sent["README.md"].decode() == CARD
    assert sent["train.parquet"] == (run / "dataset" / "train.parquet").read_bytes()


def test_a_repository_is_public_only_on_request(hub: Hub, run: Path, rlaif: Cli) -> None:
    rlaif("export", run, "--to", "hf:me/pairs", "--public")
    assert not hub.created[0].get("private")


def test_obstacles_are_reported_before_anything_is_sent(
    hub: Hub, run: Path, tmp_path: Path, rlaif: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "a/b/c" in rlaif("export", run, "--to", "hf:a/b/c", code=2).stderr
    assert "expects hf:OWNER/NAME or a URL" in rlaif("export", run, "--to", "pairs", code=2).stderr
    assert "cannot be combined" in rlaif("export", run, "--to", "hf:me/pairs", "-o", tmp_path / "o", code=2).stderr
    assert "are required" in rlaif("export", run, code=2).stderr
    monkeypatch.delenv("HF_TOKEN")
    stderr = rlaif("export", run, "--to", "hf:me/pairs", code=2).stderr
    assert "hf auth login" in stderr
    (run / "dataset" / "train.parquet").unlink()
    assert "no dataset yet" in rlaif("export", run, "--to", "hf:me/pairs", code=2).stderr
    assert not hub.created


def test_a_rejection_by_the_hub_is_reported(hub: Hub, run: Path, rlaif: Cli) -> None:
    stderr = rlaif("export", run, "--to", "hf:me/others", code=1).stderr
    assert "hf:me/others: the upload failed: " in stderr
    assert "hf_secret" not in stderr


def test_an_unreachable_hub_is_reported(hub: Hub, run: Path, rlaif: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "hf:me/pairs: the upload failed: " in rlaif("export", run, "--to", "hf:me/pairs", code=1).stderr

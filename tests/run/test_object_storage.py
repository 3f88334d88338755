"""Object storage: prompts are read from it and datasets written to it.

The servers run on this machine and use the providers' protocols: moto for S3, an emulator of Google Cloud Storage, and
Microsoft's Azurite.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

from rlaif.errors import StorageError, UsageError
from rlaif.run import object_storage
from rlaif.serving.ports import free_port
from tests.conftest import ROOT, needs_file, needs_tools, write_jsonl

Cli = Callable[..., subprocess.CompletedProcess[str]]
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")
SERVE = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """Start an S3 server and return its URL."""
    python = needs_tools("moto", "flask", "flask_cors")
    process = subprocess.Popen(
        [python, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


@pytest.fixture
def s3(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set credentials and endpoint in the environment, as a user does, and return the URL of a new folder."""
    for name, value in zip(NAMES, ("me", "secret-key", "us-east-1", store), strict=True):
        monkeypatch.setenv(name, value)
    from pyarrow import fs

    fs.S3FileSystem(region="us-east-1", endpoint_override=store, allow_bucket_creation=True).create_dir("data")
    return f"s3://data/{os.urandom(4).hex()}"


def start_server(line: list[str | Path], port: int, log_dir: Path) -> subprocess.Popen[bytes]:
    """Start the command ``line``, and return its process when it accepts connections at ``port``."""
    with (log_dir / "server.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
    for _ in range(300):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        assert process.poll() is None, (log_dir / "server.log").read_text()
        time.sleep(0.1)
    raise AssertionError((log_dir / "server.log").read_text())


@pytest.fixture
def gs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Like ``s3``, for Google Cloud Storage."""
    python, port = needs_tools("gcp_storage_emulator"), free_port()
    line = ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=data"]
    process = start_server([python, "-m", "gcp_storage_emulator", *line], port, tmp_path)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs://data/here"
    process.kill()
    process.wait()


@pytest.fixture
def az(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Like ``s3``, for Azure Blob Storage."""
    azurite = needs_file(ROOT / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob", "azurite")
    port = free_port()
    line = ["--silent", "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--blobPort", str(port)]
    monkeypatch.setenv("AZURITE_ACCOUNTS", "me:a2V5")
    process = start_server([azurite, *line], port, tmp_path)
    connection_string = f"AccountName=me;AccountKey=a2V5;BlobEndpoint=http://127.0.0.1:{port}/me;"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string)
    from pyarrow import fs

    fs.AzureFileSystem(**object_storage._azure_account_options("az://data")).create_dir("data")
    yield "az://data/here"
    process.kill()
    process.wait()


@pytest.mark.parametrize("kind", ["s3", "gs", "az"])
def test_uploaded_files_can_be_listed_and_read(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base, folder = request.getfixturevalue(kind), tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"prompt": "Say something."}\n' * 1000)
    (folder / "more" / "b.csv").write_text("prompt\nSay anything.\n")
    assert object_storage.upload_dir(folder, base) == [f"{base}/a.jsonl", f"{base}/more/b.csv"]
    assert object_storage.list_files(f"{base}/", (".jsonl", ".csv")) == [f"{base}/a.jsonl", f"{base}/more/b.csv"]
    assert object_storage.list_files(f"{base}/a.jsonl", (".jsonl",)) == [f"{base}/a.jsonl"]
    with object_storage.open_remote(f"{base}/a.jsonl") as file:
        assert file.read() == (folder / "a.jsonl").read_bytes()
    (folder / "a.jsonl").write_text("")
    object_storage.upload_dir(folder, base)
    with object_storage.open_remote(f"{base}/a.jsonl") as file:
        assert file.read() == b""
    for missing in (f"{base}/none.jsonl", f"{kind}://no-such-bucket/x"):
        with pytest.raises(StorageError, match="no such"):
            object_storage.list_files(missing, (".jsonl",))


def test_the_error_about_wrong_credentials_does_not_contain_them(az: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connection_string = os.environ["AZURE_STORAGE_CONNECTION_STRING"].replace("a2V5", "AAAA")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string)
    with pytest.raises(StorageError, match="failed to authenticate") as raised:
        object_storage.list_files(az, (".jsonl",))
    assert "AAAA" not in str(raised.value)


@pytest.mark.parametrize("url", ["s3://data//b.jsonl", "s3://data/a//b.jsonl", "gs://data/a//b", "az://data/a//b/"])
def test_an_empty_name_in_a_url_is_an_error(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    for use in (
        lambda: object_storage.list_files(url, (".jsonl",)),
        object_storage.open_remote(url).__enter__,
        lambda: object_storage.upload_dir(tmp_path, url),
    ):
        with pytest.raises(UsageError, match="an empty name between two slashes") as raised:
            use()
        assert raised.value.location in (url, url.rstrip("/"))


def test_a_connection_string_without_account_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "garbage")
    with pytest.raises(UsageError, match="AZURE_STORAGE_CONNECTION_STRING names no AccountName"):
        object_storage.list_files("az://c/x", (".jsonl",))


def test_the_connection_string_sets_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCOUNT_NAME", "ACCOUNT_KEY", "SAS_TOKEN"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    key = {"account_name": "me", "account_key": "k==", "sas_token": None}
    for connection_string, expected in (
        (
            "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=k==;EndpointSuffix=core.chinacloudapi.cn",
            {
                **key,
                "blob_storage_authority": ".blob.core.chinacloudapi.cn",
                "dfs_storage_authority": ".dfs.core.chinacloudapi.cn",
            },
        ),
        (
            "AccountName=me;SharedAccessSignature=sv=1&sig=x%3D;BlobEndpoint=https://me.blob.core.windows.net/",
            {
                "account_name": "me",
                "account_key": None,
                "sas_token": "sv=1&sig=x%3D",
                "blob_storage_scheme": "https",
                "blob_storage_authority": ".blob.core.windows.net",
                "dfs_storage_scheme": "https",
                "dfs_storage_authority": ".dfs.core.windows.net",
            },
        ),
    ):
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string)
        assert object_storage._azure_account_options("az://c/x") == expected


def prompts(run: Path) -> list[str]:
    lines = (run / "journal" / "prompts.jsonl").read_text().splitlines()
    return sorted(match[1] for line in lines if (match := re.search(r'"content":"([^"]+)"', line)))


QUESTIONS = [f"What is the {word} of it?" for word in ("length", "weight", "colour", "price", "age", "name")]


def test_prompts_are_read_from_a_folder_of_files(
    s3: str, tmp_path: Path, rlaif: Cli, serve: Callable[..., object]
) -> None:
    folder = tmp_path / "prompts"
    (folder / "more").mkdir(parents=True)
    rows = [{"prompt": question} for question in QUESTIONS]
    pl.DataFrame(rows[:2]).write_parquet(folder / "a.parquet")
    write_jsonl(folder / "b.jsonl", rows[2:4])
    pl.DataFrame(rows[4:]).write_csv(folder / "more" / "c.csv")
    (folder / "notes.txt").write_text("no prompts")
    assert object_storage.upload_dir(folder, s3) == [
        f"{s3}/{name}" for name in ("a.parquet", "b.jsonl", "more/c.csv", "notes.txt")
    ]
    server = serve()
    options = ("--model", "m", "--base-url", server.url, "-n", "1", "--heldout-fraction", "0", "--prompts")  # type: ignore[attr-defined]
    for number, source in enumerate((s3, f"{s3}/")):
        rlaif("generate", tmp_path / f"run{number}", *options, source)
        assert prompts(tmp_path / f"run{number}") == sorted(QUESTIONS)
    rlaif("generate", tmp_path / "one", *options, f"{s3}/b.jsonl")
    assert prompts(tmp_path / "one") == sorted(QUESTIONS[2:4])
    assert f'"source":"{s3}/b.jsonl:1"' in (tmp_path / "one" / "journal" / "prompts.jsonl").read_text()
    assert "secret-key" not in "".join(path.read_text() for path in (tmp_path / "one").rglob("*.json*"))


def test_answers_are_imported_from_object_storage(s3: str, tmp_path: Path, rlaif: Cli) -> None:
    (tmp_path / "answers").mkdir()
    write_jsonl(
        tmp_path / "answers" / "a.jsonl", [{"prompt": "Say something.", "responses": ["Something.", "Anything."]}]
    )
    object_storage.upload_dir(tmp_path / "answers", s3)
    assert "2 answers" in rlaif("generate", tmp_path / "run", "--import", f"{s3}/a.jsonl").stdout


def test_the_error_names_the_url_of_a_bad_row(s3: str, tmp_path: Path, rlaif: Cli) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "bad.jsonl").write_text('{"prompt": "Say something."}\n{"prompt": \n')
    object_storage.upload_dir(tmp_path / "p", s3)
    stderr = rlaif("generate", tmp_path / "run", "--model", "m", "--prompts", s3, code=2).stderr
    assert f"{s3}/bad.jsonl:2: not JSON" in stderr


def test_missing_files_and_buckets_are_errors(s3: str, tmp_path: Path, rlaif: Cli) -> None:
    stderr = rlaif("generate", tmp_path / "run", "--model", "m", "--prompts", f"{s3}/none.jsonl", code=1).stderr
    assert stderr.startswith(f"rlaif: {s3}/none.jsonl: no such file")
    with (
        pytest.raises(StorageError, match="no such bucket or file"),
        object_storage.open_remote("s3://no-such-bucket/x.jsonl"),
    ):
        pass


def test_the_error_about_an_unreachable_storage_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("me", "secret-key", "us-east-1", "http://127.0.0.1:9"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError) as raised:
        object_storage.list_files("s3://data/x", (".jsonl",))
    assert "AWS_ENDPOINT_URL" in str(raised.value)
    assert "secret-key" not in str(raised.value)
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3:///x", "names no bucket"),
        ("s3://me:secret@bucket/x", "user name or password"),
        ("az://container/x", "AZURE_STORAGE_ACCOUNT_NAME is not set"),
    ],
)
def test_invalid_urls_are_rejected(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCOUNT_NAME", "CONNECTION_STRING"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    with pytest.raises(UsageError, match=message):
        object_storage.list_files(url, (".jsonl",))


@pytest.mark.parametrize(
    ("source", "remote"),
    [("s3://b/x", True), ("gs://b/x", True), ("az://c/x", True), ("a/b.jsonl", False), ("hf:a/b", False)],
)
def test_is_remote(source: str, remote: bool) -> None:
    assert object_storage.is_remote(source) is remote


def test_other_kinds_of_url_are_rejected() -> None:
    with pytest.raises(UsageError, match="ftp:// are not supported"):
        object_storage.is_remote("ftp://host/x.jsonl")


def test_pyarrow_has_all_three_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creating them needs no network."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for url in ("s3://b/x", "gs://b/x", "az://b/x"):
        system, path = object_storage._filesystem(url)
        assert (system.type_name, path) == ({"s": "s3", "g": "gcs", "a": "abfs"}[url[0]], "b/x")

"""Files in object storage (s3://, gs://, az://), through pyarrow's file systems.

Credentials and endpoints come only from the environment variables that each provider's own tools use, never from
rlaif.toml or a flag:

    s3://BUCKET/KEY     AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the machine's role), AWS_REGION,
                        AWS_ENDPOINT_URL for another store with the S3 protocol (MinIO, Ceph, R2)
    gs://BUCKET/KEY     GOOGLE_APPLICATION_CREDENTIALS, or the machine's account; STORAGE_EMULATOR_HOST for an emulator
    az://CONTAINER/KEY  AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN, or the
                        machine's identity); or AZURE_STORAGE_CONNECTION_STRING, which can also name a
                        sovereign cloud (EndpointSuffix) or an emulator (BlobEndpoint)
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from rlaif.errors import StorageError, UsageError

SCHEMES = ("s3", "gs", "az")
BUFFER_BYTES = 8 << 20
RETRY_LIMIT_S = 60
CREDENTIAL_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION (and AWS_ENDPOINT_URL for a store other than AWS)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN; or "
    "AZURE_STORAGE_CONNECTION_STRING",
}


def is_remote(source: str) -> bool:
    """Return whether ``source`` is an object storage URL. Raises :class:`UsageError` for other kinds of URL."""
    scheme, slashes, _ = source.partition("://")
    if not slashes or "/" in scheme:
        return False
    if scheme not in SCHEMES:
        supported = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(
            f"URLs with {scheme}:// are not supported",
            location=source,
            hint=f"Use {supported}, or copy the files to this machine.",
        )
    return True


def list_files(url: str, endings: Sequence[str]) -> list[str]:
    """Return the sorted URLs of the files under ``url`` that end in one of ``endings``; only ``url`` if it is a file.

    Raises :class:`StorageError` if there are none.
    """
    with _translate_errors(url):
        system, path = _filesystem(url)
        (target,) = system.get_file_info([path])
        if target.is_file:
            return [url]
        from pyarrow.fs import FileSelector

        entries = system.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    scheme = url.partition("://")[0]
    urls = sorted(f"{scheme}://{info.path}" for info in entries if info.is_file and info.path.endswith(tuple(endings)))
    if not urls:
        raise StorageError(f"no such file, and no file ending in {', '.join(endings)} under it", location=url)
    return urls


@contextlib.contextmanager
def open_remote(url: str) -> Iterator[BinaryIO]:
    """Open the file at ``url`` for buffered reading with seek. Raises :class:`StorageError`."""
    with _translate_errors(url):
        system, path = _filesystem(url)
        with system.open_input_file(path) as file, io.BufferedReader(file, BUFFER_BYTES) as reader:
            yield reader


def upload_dir(folder: Path, url: str) -> list[str]:
    """Upload all files in ``folder`` to ``url``, replacing files of the same name, and return their URLs.

    Raises :class:`StorageError`.
    """
    from pyarrow import fs

    base = url.rstrip("/")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    with _translate_errors(url, "written to"):
        system, path = _filesystem(base)
        for name in names:
            fs.copy_files(str(folder / name), f"{path}/{name}", fs.LocalFileSystem(), system)
    return [f"{base}/{name}" for name in names]


def _filesystem(url: str) -> tuple[Any, str]:
    """Return pyarrow's file system for ``url``, and the path of ``url`` in it. Raises :class:`UsageError`."""
    from pyarrow import fs

    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc:
        raise UsageError(
            "the URL must not contain a user name or password" if parts.netloc else "the URL names no bucket",
            location=url,
            hint=f"Write it as {parts.scheme}://BUCKET/PATH; credentials come from the environment.",
        )
    path = url.partition("://")[2]
    if "//" in path.rstrip("/"):  # providers allow it, pyarrow does not
        raise UsageError(
            "there is an empty name between two slashes",
            location=url,
            hint=f"Write it as {parts.scheme}://BUCKET/PATH. Copy a file whose key has an empty part to another key.",
        )
    match parts.scheme:
        case "s3":
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if not region and not endpoint:
                region = fs.resolve_s3_region(parts.netloc)
            return fs.S3FileSystem(region=region or "us-east-1", endpoint_override=endpoint, connect_timeout=10), path
        case "gs":
            return fs.GcsFileSystem(
                retry_time_limit=datetime.timedelta(seconds=RETRY_LIMIT_S), **_gcs_emulator_options()
            ), path
        case _:
            return fs.AzureFileSystem(**_azure_account_options(url)), path


def _gcs_emulator_options() -> dict[str, Any]:
    """Return the options for an emulator of Google Cloud Storage, from the variable that Google's clients use.

    An emulator needs no credentials.
    """
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    if not host:
        return {}
    scheme, _, endpoint = host.rpartition("://")
    return {"anonymous": True, "scheme": scheme or "http", "endpoint_override": endpoint.rstrip("/")}


def _azure_account_options(url: str) -> dict[str, str | None]:
    """Return the options for Azure: from the connection string if it is set, else from the separate variables.

    Raises :class:`UsageError` if neither names the account.
    """
    connection_string = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    parts = dict(part.strip().partition("=")[::2] for part in connection_string.split(";") if part.strip())
    account = parts.get("AccountName") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        problem = (
            "AZURE_STORAGE_CONNECTION_STRING names no AccountName"
            if connection_string
            else "AZURE_STORAGE_ACCOUNT_NAME is not set"
        )
        raise UsageError(problem, location=url, hint=f"Set {CREDENTIAL_VARIABLES['az']}.")
    key = parts.get("AccountKey") or os.environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    token = parts.get("SharedAccessSignature") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    options = {
        "account_name": account,
        "account_key": key,
        "sas_token": None if key else token,
    }  # pyarrow accepts only one
    for kind in ("blob", "dfs"):
        if parts.get("EndpointSuffix"):
            options[f"{kind}_storage_authority"] = f".{kind}.{parts['EndpointSuffix']}"
        if parts.get("BlobEndpoint"):
            blob_url = urlsplit(parts["BlobEndpoint"])
            options[f"{kind}_storage_scheme"] = blob_url.scheme
            # An emulator has the account in its path, others before the first dot.
            options[f"{kind}_storage_authority"] = blob_url.netloc.removeprefix(account).replace(
                ".blob.", f".{kind}.", 1
            )
    return options


@contextlib.contextmanager
def _translate_errors(url: str, verb: str = "read") -> Iterator[None]:
    """Raise the storage's errors as :class:`StorageError`, in one line.

    The messages contain no credentials, because none of the libraries includes them.
    """
    try:
        yield
    except FileNotFoundError:
        raise StorageError("no such bucket or file", location=url) from None
    except OSError as error:
        raise StorageError(
            f"cannot be {verb}: {_short_message(str(error))}",
            location=url,
            hint=f"Check the environment variables {CREDENTIAL_VARIABLES[url.partition('://')[0]]}.",
        ) from None


def _short_message(text: str) -> str:
    """Return the storage's own message, without what the library adds to it."""
    first_line = (text.strip().splitlines() or ["no reason given"])[0]
    match = re.search(r"(AWS Error .*?)(?:; Details|: No response body|$)", first_line)
    return match[1] if match else first_line.partition(" Learn more")[0][:300]

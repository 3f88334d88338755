"""Files in object storage: s3://, gs:// and az://, by the file systems that come with pyarrow.

Who one is and where the storage stands comes from the environment, by the names that each provider's own tools use;
never from a file of ours or a flag:

    s3://BUCKET/KEY     AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the machine's role), AWS_REGION,
                        AWS_ENDPOINT_URL for another store that speaks S3 (MinIO, Ceph, R2)
    gs://BUCKET/KEY     GOOGLE_APPLICATION_CREDENTIALS, or the machine's account; STORAGE_EMULATOR_HOST for an emulator
    az://CONTAINER/KEY  AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN, or the
                        machine's identity); or AZURE_STORAGE_CONNECTION_STRING, which also names another place: a
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
    """Whether ``source`` is a URL of object storage. Raises :class:`UsageError` for a URL of another kind."""
    scheme, slashes, _ = source.partition("://")
    if not slashes or "/" in scheme:
        return False
    if scheme not in SCHEMES:
        supported = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(f"{scheme}:// cannot be read or written", location=source,
                         hint=f"There is {supported}; or copy it to this machine.")  # fmt: skip
    return True


def list_files(url: str, endings: Sequence[str]) -> list[str]:
    """The URLs of the files below ``url`` that have one of ``endings``, by name; ``url`` itself where it is a file."""
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
        raise StorageError("there is no such file, nor any below it", location=url)
    return urls


@contextlib.contextmanager
def open_remote(url: str) -> Iterator[BinaryIO]:
    """The file at ``url`` for reading, buffered, with seek."""
    with _translate_errors(url):
        system, path = _filesystem(url)
        with system.open_input_file(path) as file, io.BufferedReader(file, BUFFER_BYTES) as reader:
            yield reader


def upload_dir(folder: Path, url: str) -> list[str]:
    """Copy all files of ``folder`` to below ``url``; those of the same name there are replaced. Returns their URLs."""
    from pyarrow import fs

    base = url.rstrip("/")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    with _translate_errors(url, "written to"):
        system, path = _filesystem(base)
        for name in names:
            fs.copy_files(str(folder / name), f"{path}/{name}", fs.LocalFileSystem(), system)
    return [f"{base}/{name}" for name in names]


def _filesystem(url: str) -> tuple[Any, str]:
    """pyarrow's file system for ``url``, and the path of ``url`` in it. Raises :class:`UsageError`."""
    from pyarrow import fs

    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc:
        raise UsageError(
            "no bucket is named" if not parts.netloc else "a URL may hold no name or password",
            location=url,
            hint=f"Write it as {parts.scheme}://BUCKET/PATH; keys come from the environment.",
        )
    path = url.partition("://")[2]
    if "//" in path.rstrip("/"):  # providers allow it, and pyarrow does not
        raise UsageError("there is an empty name between two slashes", location=url,
                         hint=f"Write it as {parts.scheme}://BUCKET/PATH; a file whose key has an empty part cannot be "
                         "reached: copy it to another key.")  # fmt: skip
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
    """Of Google's storage, by the name that Google's own clients know in the environment. It wants no key."""
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    if not host:
        return {}
    scheme, _, endpoint = host.rpartition("://")
    return {"anonymous": True, "scheme": scheme or "http", "endpoint_override": endpoint.rstrip("/")}


def _azure_account_options(url: str) -> dict[str, str | None]:
    """Azure's: the connection string's parts where there is one, else what is named one by one."""
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
    options = {"account_name": account, "account_key": key, "sas_token": None if key else token}  # one is taken
    for kind in ("blob", "dfs"):
        if parts.get("EndpointSuffix"):
            options[f"{kind}_storage_authority"] = f".{kind}.{parts['EndpointSuffix']}"
        if parts.get("BlobEndpoint"):
            blob_url = urlsplit(parts["BlobEndpoint"])
            options[f"{kind}_storage_scheme"] = blob_url.scheme
            # With the account in its path, as an emulator has it; or else before its first dot.
            options[f"{kind}_storage_authority"] = blob_url.netloc.removeprefix(account).replace(
                ".blob.", f".{kind}.", 1
            )
    return options


@contextlib.contextmanager
def _translate_errors(url: str, verb: str = "read") -> Iterator[None]:
    """What the storage says, in one line. Never with keys: none of the libraries puts them into a message."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError("there is no such bucket or file", location=url) from None
    except OSError as error:
        raise StorageError(
            f"cannot be {verb}: {_short_message(str(error))}",
            location=url,
            hint=f"Keys and place come from the environment: {CREDENTIAL_VARIABLES[url.partition('://')[0]]}.",
        ) from None


def _short_message(text: str) -> str:
    """The storage's own words, without what the library adds of itself."""
    match = re.search(
        r"(AWS Error .*?)(?:; Details|: No response body|$)", text.strip().splitlines()[0] if text else ""
    )
    message = (text.strip().splitlines() or ["no reason given"])[0].partition(" Learn more")[0]
    return match[1] if match else message[:300]

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
BUFFER = 8 << 20
GIVE_UP_S = 60
NAMES = {
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
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(f"{scheme}:// cannot be read or written", where=source,
                         mend=f"There is {known}; or copy it to this machine.")  # fmt: skip
    return True


def files(url: str, endings: Sequence[str]) -> list[str]:
    """The URLs of the files below ``url`` that have one of ``endings``, by name; ``url`` itself where it is a file."""
    with _told(url):
        system, path = _system(url)
        (here,) = system.get_file_info([path])
        if here.is_file:
            return [url]
        from pyarrow.fs import FileSelector

        below = system.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    scheme = url.partition("://")[0]
    found = sorted(f"{scheme}://{info.path}" for info in below if info.is_file and info.path.endswith(tuple(endings)))
    if not found:
        raise StorageError("there is no such file, nor any below it", where=url)
    return found


@contextlib.contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """The file at ``url`` for reading, buffered, with seek."""
    with _told(url):
        system, path = _system(url)
        with system.open_input_file(path) as file, io.BufferedReader(file, BUFFER) as buffered:
            yield buffered


def upload(folder: Path, url: str) -> list[str]:
    """Copy all files of ``folder`` to below ``url``; those of the same name there are replaced. Returns their URLs."""
    from pyarrow import fs

    base = url.rstrip("/")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    with _told(url, "written to"):
        system, path = _system(base)
        for name in names:
            fs.copy_files(str(folder / name), f"{path}/{name}", fs.LocalFileSystem(), system)
    return [f"{base}/{name}" for name in names]


def _system(url: str) -> tuple[Any, str]:
    """pyarrow's file system for ``url``, and the path of ``url`` in it. Raises :class:`UsageError`."""
    from pyarrow import fs

    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc:
        raise UsageError("no bucket is named" if not parts.netloc else "a URL may hold no name or password", where=url,
                         mend=f"Write it as {parts.scheme}://BUCKET/PATH; keys come from the environment.")  # fmt: skip
    path = url.partition("://")[2]
    if "//" in path.rstrip("/"):  # providers allow it, and pyarrow does not
        raise UsageError("there is an empty name between two slashes", where=url,
                         mend=f"Write it as {parts.scheme}://BUCKET/PATH; a file whose key has an empty part cannot be "
                         "reached: copy it to another key.")  # fmt: skip
    match parts.scheme:
        case "s3":
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if not region and not endpoint:
                region = fs.resolve_s3_region(parts.netloc)
            return fs.S3FileSystem(region=region or "us-east-1", endpoint_override=endpoint, connect_timeout=10), path
        case "gs":
            return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=GIVE_UP_S), **_emulator()), path
        case _:
            return fs.AzureFileSystem(**_account(url)), path


def _emulator() -> dict[str, Any]:
    """Of Google's storage, by the name that Google's own clients know in the environment. It wants no key."""
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    if not host:
        return {}
    scheme, _, place = host.rpartition("://")
    return {"anonymous": True, "scheme": scheme or "http", "endpoint_override": place.rstrip("/")}


def _account(url: str) -> dict[str, str | None]:
    """Azure's: the connection string's parts where there is one, else what is named one by one."""
    told = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    parts = dict(part.strip().partition("=")[::2] for part in told.split(";") if part.strip())
    account = parts.get("AccountName") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        lacking = (
            "AZURE_STORAGE_CONNECTION_STRING names no AccountName" if told else "AZURE_STORAGE_ACCOUNT_NAME is not set"
        )
        raise UsageError(lacking, where=url, mend=f"Set {NAMES['az']}.")
    key = parts.get("AccountKey") or os.environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    token = parts.get("SharedAccessSignature") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    found = {"account_name": account, "account_key": key, "sas_token": None if key else token}  # one is taken
    for kind in ("blob", "dfs"):
        if parts.get("EndpointSuffix"):
            found[f"{kind}_storage_authority"] = f".{kind}.{parts['EndpointSuffix']}"
        if parts.get("BlobEndpoint"):
            place = urlsplit(parts["BlobEndpoint"])
            found[f"{kind}_storage_scheme"] = place.scheme
            # With the account in its path, as an emulator has it; or else before its first dot.
            found[f"{kind}_storage_authority"] = place.netloc.removeprefix(account).replace(".blob.", f".{kind}.", 1)
    return found


@contextlib.contextmanager
def _told(url: str, done: str = "read") -> Iterator[None]:
    """What the storage says, in one line. Never with keys: none of the libraries puts them into a message."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError("there is no such bucket or file", where=url) from None
    except OSError as error:
        raise StorageError(
            f"cannot be {done}: {_short(str(error))}",
            where=url,
            mend=f"Keys and place come from the environment: {NAMES[url.partition('://')[0]]}.",
        ) from None


def _short(text: str) -> str:
    """The storage's own words, without what the library adds of itself."""
    said = re.search(r"(AWS Error .*?)(?:; Details|: No response body|$)", text.strip().splitlines()[0] if text else "")
    plain = (text.strip().splitlines() or ["no reason given"])[0].partition(" Learn more")[0]
    return said[1] if said else plain[:300]

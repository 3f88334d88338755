"""A run's dataset where others find it: a dataset repository of the hub, or object storage. Its card goes along."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlaif.errors import StorageError, UsageError
from rlaif.pair import formats
from rlaif.run import objects
from rlaif.run.directory import Run


def publish(run: Run, to: str, format: str | None = None, *, public: bool = False) -> list[str]:  # noqa: A002
    """Copy the dataset as it stands in RUN/dataset, or as ``format`` has it, to ``hf:OWNER/NAME`` or a URL of object
    storage. What else is there stays. A repository that is made for it is private unless ``public``.

    Returns what was written, as URLs. Raises :class:`StorageError`, and :class:`UsageError` before anything is sent.
    """
    hub = to.startswith("hf:")
    if not hub and not objects.is_remote(to):
        raise UsageError(f"{to!r} is neither hf:OWNER/NAME nor a URL such as s3://BUCKET/PATH",
                         mend="To write on this machine, give -o DIR.")  # fmt: skip
    if not (run.dataset / "train.parquet").exists():
        raise UsageError("there is no dataset yet", where=str(run.path), mend=f"Run first: rlaif judge {run.path}")
    with tempfile.TemporaryDirectory() as place:
        folder = run.dataset
        if format:
            folder = Path(place) / "dataset"
            formats.export_dataset(run.dataset, format, folder)
        return _to_hub(folder, to.removeprefix("hf:"), public) if hub else objects.upload(folder, to)


def _to_hub(folder: Path, name: str, public: bool) -> list[str]:
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # httpx's
    from huggingface_hub.utils._validators import validate_repo_id

    where, token = f"hf:{name}", hub.get_token()
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UsageError("no name of a repository", where=where, mend="Write it as hf:OWNER/NAME.") from None
    if not token:
        raise UsageError("the hub asks for a token, and there is none", where=where,
                         mend="Set HF_TOKEN to one that may write, or run `hf auth login`.")  # fmt: skip
    api = hub.HfApi(token=token, library_name="rlaif")
    try:
        api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        made = api.upload_folder(repo_id=name, repo_type="dataset", folder_path=folder, ignore_patterns=[".*"],
                                 commit_message="Preference dataset")  # fmt: skip
    except (OSError, HTTPError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(f"cannot be pushed: {reason[0]}", where=where,
                           mend="The token has to be allowed to write there.") from None  # fmt: skip
    return [str(made.commit_url)]

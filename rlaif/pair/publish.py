"""A run's dataset where others find it: a dataset repository of the hub, or object storage. Its card goes along."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlaif.errors import StorageError, UsageError
from rlaif.pair import export_formats
from rlaif.run import object_storage
from rlaif.run.run import Run


def publish(run: Run, destination: str, export_format: str | None = None, *, public: bool = False) -> list[str]:
    """Copy the dataset as it stands in RUN/dataset, or as ``export_format`` has it, to ``hf:OWNER/NAME`` or a URL of
    object
    storage. What else is there stays. A repository that is made for it is private unless ``public``.

    Returns what was written, as URLs. Raises :class:`StorageError`, and :class:`UsageError` before anything is sent.
    """
    is_hub = destination.startswith("hf:")
    if not is_hub and not object_storage.is_remote(destination):
        raise UsageError(f"{destination!r} is neither hf:OWNER/NAME nor a URL such as s3://BUCKET/PATH",
                         hint="To write on this machine, give -o DIR.")  # fmt: skip
    if not (run.dataset / "train.parquet").exists():
        raise UsageError("there is no dataset yet", location=str(run.path), hint=f"Run first: rlaif judge {run.path}")
    with tempfile.TemporaryDirectory() as temp_dir:
        folder = run.dataset
        if export_format:
            folder = Path(temp_dir) / "dataset"
            export_formats.export_dataset(run.dataset, export_format, folder)
        return (
            _push_to_hub(folder, destination.removeprefix("hf:"), public)
            if is_hub
            else object_storage.upload_dir(folder, destination)
        )


def _push_to_hub(folder: Path, repo_id: str, public: bool) -> list[str]:
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # httpx's
    from huggingface_hub.utils._validators import validate_repo_id

    location, token = f"hf:{repo_id}", hub.get_token()
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError("no name of a repository", location=location, hint="Write it as hf:OWNER/NAME.") from None
    if not token:
        raise UsageError("the hub asks for a token, and there is none", location=location,
                         hint="Set HF_TOKEN to one that may write, or run `hf auth login`.")  # fmt: skip
    api = hub.HfApi(token=token, library_name="rlaif")
    try:
        api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, ignore_patterns=[".*"],
                                 commit_message="Preference dataset")  # fmt: skip
    except (OSError, HTTPError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(f"cannot be pushed: {reason[0]}", location=location,
                           hint="The token has to be allowed to write there.") from None  # fmt: skip
    return [str(commit.commit_url)]

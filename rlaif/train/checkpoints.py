"""OUTPUT/checkpoints: the checkpoints from which a training can resume.

It contains ``checkpoint-N/``, as TRL's trainer writes them, and ``identity.json``, the settings and data that they
belong to. A checkpoint that a crash left incomplete is ignored in favor of the one before it. Only :func:`claim_dir`
writes here.
"""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from rlaif.errors import ConfigMismatchError, DatasetChangedError
from rlaif.run.atomic_write import atomic_path

FINGERPRINT_FILE = "identity.json"
ROW_FIELDS = {"dataset": "the dataset has other rows", "both_bad": "other pairs are labeled both bad"}
"""Fields of the fingerprint that identify the training rows, with the text for a difference."""
CONFLICT_HINT = (
    "Pass `--overwrite` (or set `overwrite = true` under [train]) to train again and replace it, or `--output DIR` to "
    "keep it."
)


def claim_dir(
    folder: Path, fingerprint: Mapping[str, Any], may_grow: tuple[str, ...], *, overwrite: bool = False
) -> None:
    """Claim ``folder`` for the training with ``fingerprint``.

    Fields in ``may_grow`` may become larger (None means no limit). A folder without checkpoints can be claimed by any.
    With ``overwrite``, the checkpoints of another training are removed. Otherwise raises :class:`ConfigMismatchError`
    if the checkpoints belong to another training, or :class:`DatasetChangedError` if only its rows differ.
    """
    path = folder / FINGERPRINT_FILE
    previous = read_json(path)
    if _numbered_checkpoints(folder):
        differences = (
            dict(_differences(previous, fingerprint, may_grow)) if previous else {"": f"{FINGERPRINT_FILE} is missing"}
        )
        details = "; ".join(sorted(differences.values()))
        if differences and overwrite:
            shutil.rmtree(folder)
        elif differences and differences.keys() <= ROW_FIELDS.keys():
            state = "finished" if _is_finished(folder, previous) else "interrupted"
            raise DatasetChangedError(
                f"since this training was {state}, its rows changed: {details}",
                location=str(folder),
                hint=CONFLICT_HINT,
            )
        elif differences:
            raise ConfigMismatchError(
                f"its checkpoints were made with other settings: {details}", location=str(folder), hint=CONFLICT_HINT
            )
    write_json(path, fingerprint)


def _is_finished(folder: Path, fingerprint: Mapping[str, Any] | None) -> bool:
    """Return whether the training with ``fingerprint`` finished: it has written training.json."""
    facts = read_json(folder.parent / "training.json")
    return facts is not None and facts.get("identity") == fingerprint


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], may_grow: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yield each field that differs, with a text that describes the difference."""
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name in may_grow:
            if new is None or (old is not None and new > old):
                continue
            yield name, f"{name} may only grow: it was {old}, now {new}"
        elif name in ROW_FIELDS:
            yield name, ROW_FIELDS[name]
        else:
            yield name, f"{name} was {old!r}, now {new!r}"


def latest_complete(folder: Path, before: int | None = None) -> tuple[Path | None, list[Path]]:
    """Return the newest complete checkpoint (of a step before ``before``), and the incomplete ones newer than it."""
    incomplete: list[Path] = []
    for path in reversed(_numbered_checkpoints(folder)):
        if before is not None and checkpoint_step(path) >= before:
            continue
        if is_complete(path):
            return path, incomplete
        incomplete.append(path)
    return None, incomplete


def checkpoint_step(checkpoint: Path) -> int:
    """Return N of ``checkpoint-N``."""
    return int(checkpoint.name.rpartition("-")[2])


def _numbered_checkpoints(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(paths, key=checkpoint_step)


def is_complete(checkpoint: Path) -> bool:
    """Return whether the checkpoint has all files to resume: weights, optimizer, scheduler, random state and step."""
    state = read_json(checkpoint / "trainer_state.json")  # the trainer writes it last
    weights = list(checkpoint.glob("*.safetensors"))
    optimizer, random = _optimizer_files(checkpoint), list(checkpoint.glob("rng_state*.pth"))
    return (
        state is not None
        and state.get("global_step") == checkpoint_step(checkpoint)
        and bool(weights)
        and all(map(_is_complete_safetensors, weights))
        and bool(optimizer)
        and bool(random)
        and all(map(zipfile.is_zipfile, [*optimizer, checkpoint / "scheduler.pt", *random]))
        and _has_all_shards(checkpoint)
    )


def _optimizer_files(checkpoint: Path) -> list[Path]:
    """Return the files of the optimizer's state, and for sharded weights the model files that are read with it.

    These are DeepSpeed's, in the folder that its ``latest`` names; FSDP's; or the one file of an unsharded training.
    Empty if DeepSpeed's files are missing.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError):
        folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
        return sorted(folder.glob("*.pt")) if any(folder.glob("*optim_states.pt")) else []
    fsdp = checkpoint / "optimizer.bin"
    return [fsdp, checkpoint / "pytorch_model_fsdp.bin"] if fsdp.exists() else [checkpoint / "optimizer.pt"]


def _has_all_shards(checkpoint: Path) -> bool:
    indexes = list(checkpoint.glob("*.safetensors.index.json"))
    return all(
        (index := read_json(path)) is not None
        and all((checkpoint / name).exists() for name in index["weight_map"].values())
        for path in indexes
    )


def _is_complete_safetensors(path: Path) -> bool:
    """Return whether the file is as long as its header says: 8 bytes of header length, the header, the tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size:
                return False
            header: dict[str, Any] = orjson.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the JSON object in ``path``; None if the file is missing or not a JSON object."""
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as JSON to ``path``, whose folder is created. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(orjson.dumps(dict(value), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

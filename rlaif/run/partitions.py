"""What is too much for memory, by parts of the prompts: written to disk as it comes, read one part at a time.

All records of a prompt are in one part, so whatever is found prompt by prompt is found part by part, with the same
result however many parts there are.
"""

from __future__ import annotations

import io
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from rlaif.errors import write_error
from rlaif.run import frames as tables

PARTITION_BYTES = 64 << 20
"""Of the journal of answers: about as many make one part."""
MAX_PARTITIONS = 256
SORT_BUFFER_ROWS = 400_000
"""Rows of a journal that are sorted into parts at once."""
MEMORY_BUFFER_BYTES = 8 << 20
"""Bytes of a store that are not written to disk, so that a small run needs none."""


def partition_count(path: Path) -> int:
    """How many parts to make of a run whose journal of answers is at ``path``."""
    size = path.stat().st_size if path.exists() else 0
    return min(MAX_PARTITIONS, 1 + size // PARTITION_BYTES)


class PartitionedFrames:
    """Frames of one schema, each of one part. They lie in a file without a name in ``folder``, which the system takes
    away when the process ends, however it ends. Raises :class:`RunError` where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.height = 0
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BUFFER_BYTES, dir=str(folder))  # noqa: SIM115  closed when let go
        self._extents: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._empty: pl.DataFrame | None = None
        weakref.finalize(self, self._file.close)

    def add(self, partition: int, frame: pl.DataFrame) -> None:
        if self._empty is None:
            self._empty = frame.clear()
        if frame.is_empty():
            return
        buffer = io.BytesIO()
        frame.write_ipc_stream(buffer)
        try:
            start = self._file.seek(0, io.SEEK_END)
            self._file.write(buffer.getbuffer())
        except OSError as error:
            raise write_error(self.folder, error) from None
        self._extents[partition].append((start, buffer.tell()))
        self.height += frame.height

    def add_partitioned(self, partition_expr: pl.Expr, frame: pl.DataFrame) -> None:
        """Each row of ``frame`` to the part of which ``part`` is the number."""
        by_partition = frame.with_columns(_part=partition_expr).partition_by("_part", as_dict=True, include_key=False)
        for (partition,), rows in by_partition.items():
            self.add(int(partition), rows)
        self.add(0, frame.clear())

    def read(self, partition: int) -> pl.DataFrame:
        """The frames of ``part`` as one, in the order in which they came, once anything was added to any part."""
        assert self._empty is not None
        frames = [self._empty]
        for start, size in self._extents[partition]:
            self._file.seek(start)
            frames.append(pl.read_ipc_stream(io.BytesIO(self._file.read(size))))
        return pl.concat(frames)

    def __iter__(self) -> Iterator[pl.DataFrame]:
        for partition in sorted(self._extents):
            yield self.read(partition)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Every row of every part."""
        for frame in self:
            yield from frame.iter_rows()


class PartitionedJournal:
    """The answers in the journal at ``path`` by parts of their prompts, as :func:`rlaif.run.frames.read_journal_frame`
    gives them without parts. What is appended to the journal later is there after :meth:`catch_up`.

    Raises :class:`RunError` naming a damaged line."""

    def __init__(
        self,
        path: Path,
        schema: Mapping[str, Any],
        reduce: Callable[[pl.DataFrame], pl.DataFrame],
        folder: Path,
        partitions: int,
    ) -> None:
        self.path, self.schema, self.reduce, self.partitions = path, schema, reduce, partitions
        self._pieces = PartitionedFrames(folder)
        self._pieces.add(0, tables.empty_frame(schema, reduce))
        self._end = 0
        self.catch_up()

    def catch_up(self) -> None:
        buffered: list[pl.DataFrame] = []
        for frame, end in tables.iter_journal_frames(self.path, self.schema, self.reduce, self._end):
            self._end = end
            buffered.append(frame)
            if sum(buffered_frame.height for buffered_frame in buffered) >= SORT_BUFFER_ROWS:
                self._add(pl.concat(buffered))
                buffered.clear()
        if buffered:
            self._add(pl.concat(buffered))

    def _add(self, frame: pl.DataFrame) -> None:
        self._pieces.add_partitioned(pl.col("prompt_id").hash(seed=0) % self.partitions, frame)

    def read(self, partition: int) -> pl.DataFrame:
        return tables.keep_latest(self._pieces.read(partition))

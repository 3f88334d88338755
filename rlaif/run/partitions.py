"""Partition records by prompt: what does not fit in memory is written to disk and read one partition at a time.

All records of a prompt are in the same partition. So a computation per prompt can run per partition, and its result
does not depend on the number of partitions.
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
from rlaif.run.frames import empty_frame, iter_journal_frames, keep_latest

PARTITION_BYTES = 64 << 20
"""Approximate size of one partition, in bytes of the completions journal."""
MAX_PARTITIONS = 256
SORT_BUFFER_ROWS = 400_000
"""Number of journal rows that are partitioned at once."""
MEMORY_BUFFER_BYTES = 8 << 20
"""Bytes that are held in memory before a file is used, so that a small run writes none."""


def partition_count(path: Path) -> int:
    """Return the number of partitions for a run whose completions journal is at ``path``."""
    size = path.stat().st_size if path.exists() else 0
    return min(MAX_PARTITIONS, 1 + size // PARTITION_BYTES)


def partition_of_prompt(partitions: int) -> pl.Expr:
    """Return the partition that holds all records of a prompt (column prompt_id)."""
    return pl.col("prompt_id").hash(seed=0) % partitions


class PartitionedFrames:
    """Frames of one schema, stored per partition in an unnamed file in ``folder``.

    The operating system removes the file when the process ends, even if it is killed. Raises :class:`RunError` if the
    file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.height = 0
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BUFFER_BYTES, dir=str(folder))  # noqa: SIM115  closed by the finalizer below
        self._extents: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._empty: pl.DataFrame | None = None
        weakref.finalize(self, self._file.close)

    def add(self, partition: int, frame: pl.DataFrame) -> None:
        """Append ``frame`` to ``partition``."""
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
        """Append each row of ``frame`` to the partition whose number ``partition_expr`` gives."""
        by_partition = frame.with_columns(_partition=partition_expr).partition_by(
            "_partition", as_dict=True, include_key=False
        )
        for (partition,), rows in by_partition.items():
            self.add(int(partition), rows)
        self.add(0, frame.clear())

    def read(self, partition: int) -> pl.DataFrame:
        """Return the rows of ``partition`` in the order in which they were added. Something must have been added."""
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
        """Yield every row of every partition."""
        for frame in self:
            yield from frame.iter_rows()


class PartitionedJournal:
    """The answers in the journal at ``path``, partitioned by prompt.

    Columns are those of :func:`rlaif.run.frames.read_journal_frame`. Records that are appended to the journal later are
    included after :meth:`catch_up`. Raises :class:`RunError` naming a damaged line.
    """

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
        self._pieces.add(0, empty_frame(schema, reduce))
        self._end = 0
        self.catch_up()

    def catch_up(self) -> None:
        """Read what was appended to the journal since the last call."""
        buffered: list[pl.DataFrame] = []
        for frame, end in iter_journal_frames(self.path, self.schema, self.reduce, self._end):
            self._end = end
            buffered.append(frame)
            if sum(buffered_frame.height for buffered_frame in buffered) >= SORT_BUFFER_ROWS:
                self._add(pl.concat(buffered))
                buffered.clear()
        if buffered:
            self._add(pl.concat(buffered))

    def _add(self, frame: pl.DataFrame) -> None:
        self._pieces.add_partitioned(partition_of_prompt(self.partitions), frame)

    def read(self, partition: int) -> pl.DataFrame:
        """Return the newest answer with each key in ``partition``."""
        return keep_latest(self._pieces.read(partition))

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

from rlaif.errors import cannot_be_written
from rlaif.run import tables

BYTES = 64 << 20
"""Of the journal of answers: about as many make one part."""
MOST = 256
HELD = 400_000
"""Rows of a journal that are sorted into parts at once."""
IN_MEMORY = 8 << 20
"""Bytes of a store that are not written to disk, so that a small run needs none."""


def count(path: Path) -> int:
    """How many parts to make of a run whose journal of answers is at ``path``."""
    size = path.stat().st_size if path.exists() else 0
    return min(MOST, 1 + size // BYTES)


class Pieces:
    """Frames of one schema, each of one part. They lie in a file without a name in ``folder``, which the system takes
    away when the process ends, however it ends. Raises :class:`RunError` where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.height = 0
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(folder))  # noqa: SIM115  closed when let go
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._none: pl.DataFrame | None = None
        weakref.finalize(self, self._file.close)

    def add(self, part: int, frame: pl.DataFrame) -> None:
        if self._none is None:
            self._none = frame.clear()
        if frame.is_empty():
            return
        written = io.BytesIO()
        frame.write_ipc_stream(written)
        try:
            start = self._file.seek(0, io.SEEK_END)
            self._file.write(written.getbuffer())
        except OSError as error:
            raise cannot_be_written(self.folder, error) from None
        self._places[part].append((start, written.tell()))
        self.height += frame.height

    def add_by(self, part: pl.Expr, frame: pl.DataFrame) -> None:
        """Each row of ``frame`` to the part of which ``part`` is the number."""
        own = frame.with_columns(_part=part).partition_by("_part", as_dict=True, include_key=False)
        for (number,), rows in own.items():
            self.add(int(number), rows)
        self.add(0, frame.clear())

    def read(self, part: int) -> pl.DataFrame:
        """The frames of ``part`` as one, in the order in which they came, once anything was added to any part."""
        assert self._none is not None
        frames = [self._none]
        for start, size in self._places[part]:
            self._file.seek(start)
            frames.append(pl.read_ipc_stream(io.BytesIO(self._file.read(size))))
        return pl.concat(frames)

    def __iter__(self) -> Iterator[pl.DataFrame]:
        for part in sorted(self._places):
            yield self.read(part)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Every row of every part."""
        for frame in self:
            yield from frame.iter_rows()


class Journaled:
    """The answers in the journal at ``path`` by parts of their prompts, as :func:`rlaif.run.tables.scan` gives them
    without parts. What is appended to the journal later is there after :meth:`catch_up`.

    Raises :class:`RunError` naming a damaged line."""

    def __init__(
        self,
        path: Path,
        schema: Mapping[str, Any],
        reduce: Callable[[pl.DataFrame], pl.DataFrame],
        folder: Path,
        parts: int,
    ) -> None:
        self.path, self.schema, self.reduce, self.parts = path, schema, reduce, parts
        self._pieces = Pieces(folder)
        self._pieces.add(0, tables.nothing(schema, reduce))
        self._end = 0
        self.catch_up()

    def catch_up(self) -> None:
        held: list[pl.DataFrame] = []
        for frame, end in tables.frames(self.path, self.schema, self.reduce, self._end):
            self._end = end
            held.append(frame)
            if sum(each.height for each in held) >= HELD:
                self._add(pl.concat(held))
                held.clear()
        if held:
            self._add(pl.concat(held))

    def _add(self, frame: pl.DataFrame) -> None:
        self._pieces.add_by(pl.col("prompt_id").hash(seed=0) % self.parts, frame)

    def read(self, part: int) -> pl.DataFrame:
        return tables.newest(self._pieces.read(part))

"""Near duplicates by MinHash (Broder 1997), in time and memory that are bounded for each prompt.

Of each number of a signature its last byte is kept, which two unlike ones share once in 256 (Li and König 2010), and
bands are chains of 4-byte numbers: what is kept of a prompt takes half a kilobyte at the default threshold.
"""

from __future__ import annotations

import re
from array import array

import numpy as np
import numpy.typing as npt

from rlaif.records import Prompt, key_of

PERMUTATIONS = 256
RECALL = 0.999
"""How surely two prompts at the threshold share a band, by which they are compared at all."""
SHINGLE = 5
LOOKED_AT = 64
"""Prompts that share a band are compared with the last so many of them."""
ROOM = 1 << 12
BY_CHANCE = 1 / 256
MIXER = 0x9E3779B97F4A7C15


def bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many rows: the longest that meet :data:`RECALL` at ``threshold``, as these make the fewest
    comparisons in vain."""
    for rows in range(PERMUTATIONS, 1, -1):
        number = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** number >= RECALL:
            return number, rows
    return PERMUTATIONS, 1


class Similar:
    """Near duplicates by MinHash over runs of five words, Jaccard similarity at or over a threshold.

    At 0.9 about one word in a hundred differs. Case, spaces and punctuation count for nothing, but signs that carry
    meaning (C and C++, x + 5 and x - 5) do. Prompts under different system prompts or tools are never alike.

    A prompt is compared with at most ``LOOKED_AT`` others of each band. Where thousands of prompts share a long
    instruction, it takes up some of their bands, and of those only the last prompts are looked at; what tells the
    prompts apart makes the others, which few share. So of two that differ in case and punctuation alone the second is
    always found, and few near duplicates are missed while the instruction is not nearly all of the prompt.
    """

    def __init__(self, threshold: float) -> None:
        import rensa

        self._rensa = rensa
        self._alike = (BY_CHANCE + (1 - BY_CHANCE) * threshold) * PERMUTATIONS
        self._bands, self._rows = bands(threshold)
        self._each = np.arange(self._bands)
        self._weights = np.array([pow(MIXER, row + 1, 1 << 64) for row in range(self._rows)], dtype=np.uint64)
        self._count, self._room = 1, 0  # 0 is nobody's: it ends the chains
        self._signatures = np.zeros((1, PERMUTATIONS), np.uint8)
        self._arounds = np.zeros(1, np.uint64)
        self._grow()

    def seen(self, prompt: Prompt) -> bool:
        """Whether something like ``prompt`` came before; if not, remember it."""
        if self._count == self._room:
            self._grow()
        system = [message.content for message in prompt.messages if message.role == "system"]
        around = np.uint64(int(key_of(system=system, tools=prompt.tools)[:16], base=16))
        said = "\n".join(message.content or "" for message in prompt.messages if message.role != "system")
        minhash = self._rensa.RMinHash(num_perm=PERMUTATIONS, seed=1)
        minhash.update(list(_shingles(said)))
        signature = np.frombuffer(array("I", minhash.digest()), np.uintc).astype(np.uint8)
        slots = self._slots(signature[: self._bands * self._rows].reshape(self._bands, self._rows), around)
        others = self._sharing(slots)
        others = others[self._arounds[others] == around]
        if (np.count_nonzero(self._signatures[others] == signature, axis=1) >= self._alike).any():
            return True
        self._signatures[self._count], self._arounds[self._count] = signature, around
        self._before[self._count] = self._last[self._each, slots]
        self._last[self._each, slots] = self._count
        self._count += 1
        return False

    def _slots(self, band: npt.NDArray[np.uint8], around: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.int64]:
        """Where each row of ``band`` belongs in its table. Two that differ may belong into one: comparing tells."""
        mixed = (band @ self._weights + around) * np.uint64(MIXER)
        return (mixed >> np.uint64(65 - self._room.bit_length())).astype(np.int64)

    def _sharing(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The last prompts of each band's slot."""
        at: npt.NDArray[np.int32] = self._last[self._each, slots]
        found = [at[:0]]
        while len(found) <= LOOKED_AT and at.any():
            found.append(at)
            at = self._before[at, self._each]
        others = np.concatenate(found)
        return others[others > 0]

    def _grow(self) -> None:
        """Room for twice as many, the chains laid anew."""
        count, self._room = self._count, max(ROOM, 2 * self._room)
        for name in ("_signatures", "_arounds"):
            old = getattr(self, name)
            new = np.empty((self._room, *old.shape[1:]), old.dtype)
            new[:count] = old
            setattr(self, name, new)
        self._before = np.zeros((self._room, self._bands), np.int32)
        self._last = np.zeros((self._bands, self._room), np.int32)
        for band in range(self._bands):
            own = self._signatures[1:count, band * self._rows : (band + 1) * self._rows]
            slots = self._slots(own, self._arounds[1:count])
            order = np.argsort(slots, kind="stable")
            slots, order = slots[order], order + 1
            follows = np.append(False, slots[1:] == slots[:-1])[: len(slots)]
            self._before[order, band] = np.where(follows, np.roll(order, 1), 0)
            self._last[band, slots] = order  # of several in one slot, the last


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+|[^\w\s.,;:!?'\"‘’“”…–—]", text.casefold()) or [text]
    words = [""] * (SHINGLE - 1) + words + [""] * (SHINGLE - 1)  # so that the first word weighs as much as others
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}

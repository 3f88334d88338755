"""Near duplicates by MinHash (Broder 1997), with bounded time and memory per prompt, and the split that they share.

Only the last byte of each number in a signature is kept; two different numbers share it once in 256 (Li and König
2010). Bands are chains of 4-byte indexes. Together this takes half a kilobyte per prompt at the default threshold.
"""

from __future__ import annotations

import re
from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlaif.records import Prompt, content_key

PERMUTATIONS = 256
RECALL = 0.999
"""Probability that two prompts at the threshold share a band; prompts without a common band are never compared."""
SHINGLE_WORDS = 5
MAX_BAND_CANDIDATES = 64
"""Maximum number of prompts in a band, the latest ones, that a prompt is compared with."""
MAX_SPLIT_THRESHOLD = 0.9
"""Maximum similarity at which two prompts must be in the same split, even if only closer prompts are dropped."""
MIN_CAPACITY = 1 << 12
BYTE_COLLISION_RATE = 1 / 256  # share of equal last bytes between unrelated numbers
HASH_MULTIPLIER = 0x9E3779B97F4A7C15


def lsh_bands(threshold: float) -> tuple[int, int]:
    """Return the number of bands and the rows per band. Chooses the longest bands that reach :data:`RECALL` at
    ``threshold``, because they cause the fewest needless comparisons."""
    for rows in range(PERMUTATIONS, 1, -1):
        band_count = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** band_count >= RECALL:
            return band_count, rows
    return PERMUTATIONS, 1


class Signature(NamedTuple):
    """MinHash of a prompt's text (all turns but the system prompt), and a hash of its system prompt and tools."""

    minhash: npt.NDArray[np.uint8]
    context_hash: np.uint64


def prompt_signature(prompt: Prompt) -> Signature:
    """Return what :class:`NearDuplicateIndex` compares of ``prompt``."""
    import rensa

    system = [message.content for message in prompt.messages if message.role == "system"]
    context_hash = np.uint64(int(content_key(system=system, tools=prompt.tools)[:16], base=16))
    text = "\n".join(message.content or "" for message in prompt.messages if message.role != "system")
    minhash = rensa.RMinHash(num_perm=PERMUTATIONS, seed=1)
    minhash.update(list(_shingles(text)))
    return Signature(np.frombuffer(array("I", minhash.digest()), np.uintc).astype(np.uint8), context_hash)


class NearDuplicateIndex:
    """Finds near duplicates: prompts whose shingles (five consecutive words) have a Jaccard similarity of at least
    ``threshold``, estimated by MinHash.

    At 0.9 about one word in a hundred differs. Case, spaces and punctuation are ignored, but signs that carry meaning
    are not (C and C++, x + 5 and x - 5). With ``compare_context``, prompts with different system prompts or tools are
    never near duplicates.

    A prompt is compared with at most ``MAX_BAND_CANDIDATES`` others per band. If thousands of prompts share a long
    instruction, it fills some of their bands, and in those only the latest prompts are compared. The other bands come
    from the text that differs, and few prompts share them. So of two prompts that differ only in case and punctuation
    the second is always found, and few near duplicates are missed unless the instruction is nearly the entire prompt.
    """

    def __init__(self, threshold: float, *, compare_context: bool = True) -> None:
        self._compare_context = compare_context
        self._min_equal_bytes = (BYTE_COLLISION_RATE + (1 - BYTE_COLLISION_RATE) * threshold) * PERMUTATIONS
        self._band_count, self._rows_per_band = lsh_bands(threshold)
        self._band_indexes = np.arange(self._band_count)
        self._weights = np.array(
            [pow(HASH_MULTIPLIER, row + 1, 1 << 64) for row in range(self._rows_per_band)], dtype=np.uint64
        )
        self._count, self._capacity = 1, 0  # index 0 is unused: it ends the chains
        self._signatures = np.zeros((1, PERMUTATIONS), np.uint8)
        self._context_hashes = np.zeros(1, np.uint64)
        self._grow()

    def check_and_add(self, prompt: Prompt) -> bool:
        """Return True if ``prompt`` is a near duplicate of an earlier one, and add it to the index if not."""
        signature = prompt_signature(prompt)
        if self.find_first(signature):
            return True
        self.add(signature)
        return False

    def find_first(self, signature: Signature) -> int:
        """Return the number of the earliest near duplicate in the index, or 0 if there is none."""
        context_hash = self._context_hash(signature)
        candidates = self._candidates(self._signature_slots(signature))
        candidates = candidates[self._context_hashes[candidates] == context_hash]
        equal_bytes = np.count_nonzero(self._signatures[candidates] == signature.minhash, axis=1)
        near_duplicates = candidates[equal_bytes >= self._min_equal_bytes]
        return int(near_duplicates.min()) if near_duplicates.size else 0

    def add(self, signature: Signature) -> int:
        """Add a prompt and return its number: 1, 2, ..."""
        if self._count == self._capacity:
            self._grow()
        number, slots = self._count, self._signature_slots(signature)
        self._signatures[number], self._context_hashes[number] = signature.minhash, self._context_hash(signature)
        self._previous[number] = self._latest[self._band_indexes, slots]
        self._latest[self._band_indexes, slots] = number
        self._count += 1
        return number

    def _context_hash(self, signature: Signature) -> np.uint64:
        return signature.context_hash if self._compare_context else np.uint64(0)

    def _signature_slots(self, signature: Signature) -> npt.NDArray[np.int64]:
        used_rows = signature.minhash[: self._band_count * self._rows_per_band]
        return self._slots(used_rows.reshape(self._band_count, self._rows_per_band), self._context_hash(signature))

    def _slots(
        self, band: npt.NDArray[np.uint8], context_hashes: npt.NDArray[np.uint64] | np.uint64
    ) -> npt.NDArray[np.int64]:
        """Return the hash table slot of each row of ``band``. Different rows may share a slot; comparing the signatures
        tells them apart."""
        mixed = (band @ self._weights + context_hashes) * np.uint64(HASH_MULTIPLIER)
        return (mixed >> np.uint64(65 - self._capacity.bit_length())).astype(np.int64)

    def _candidates(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return the indexes of the latest prompts in each band's slot."""
        current: npt.NDArray[np.int32] = self._latest[self._band_indexes, slots]
        levels = [current[:0]]
        while len(levels) <= MAX_BAND_CANDIDATES and current.any():
            levels.append(current)
            current = self._previous[current, self._band_indexes]
        candidates = np.concatenate(levels)
        return candidates[candidates > 0]

    def _grow(self) -> None:
        """Double the capacity and rebuild the chains."""
        count, self._capacity = self._count, max(MIN_CAPACITY, 2 * self._capacity)
        for name in ("_signatures", "_context_hashes"):
            old = getattr(self, name)
            new = np.empty((self._capacity, *old.shape[1:]), old.dtype)
            new[:count] = old
            setattr(self, name, new)
        self._previous = np.zeros((self._capacity, self._band_count), np.int32)
        self._latest = np.zeros((self._band_count, self._capacity), np.int32)
        for band in range(self._band_count):
            band_rows = self._signatures[1:count, band * self._rows_per_band : (band + 1) * self._rows_per_band]
            slots = self._slots(band_rows, self._context_hashes[1:count])
            order = np.argsort(slots, kind="stable")
            slots, order = slots[order], order + 1
            follows = np.append(False, slots[1:] == slots[:-1])[: len(slots)]
            self._previous[order, band] = np.where(follows, np.roll(order, 1), 0)
            self._latest[band, slots] = order  # the last prompt of a slot wins


class SplitGroups:
    """Gives near duplicates one split: a prompt belongs to the group of the earliest prompt that it resembles.

    The groups are the connected components of the near duplicates, formed in the order of the prompts. A later prompt
    never moves an earlier one, so a split is final once it is journaled. If a prompt resembles two earlier ones that do
    not resemble each other, it follows the first, and the two keep their splits. Prompts with different system prompts
    or tools are compared too: a model that learned one of them has seen the other.
    """

    def __init__(self, near_duplicate_threshold: float) -> None:
        threshold = min(near_duplicate_threshold or MAX_SPLIT_THRESHOLD, MAX_SPLIT_THRESHOLD)
        self._index = NearDuplicateIndex(threshold, compare_context=False)
        self._group_ids, self._is_heldout = [""], bytearray(1)  # by number in the index, which starts at 1

    def assign(self, prompt: Prompt) -> Prompt:
        """Return ``prompt`` with the split of its group, and add it to the index. Groups of journaled prompts stay."""
        signature = prompt_signature(prompt)
        if prompt.split_group is None and (first := self._index.find_first(signature)):
            split = "heldout" if self._is_heldout[first] else "train"
            prompt = prompt.model_copy(update={"split": split, "split_group": self._group_ids[first]})
        self.add(prompt, signature)
        return prompt

    def add(self, prompt: Prompt, signature: Signature | None = None) -> None:
        """Add a prompt whose split is final."""
        self._index.add(signature or prompt_signature(prompt))
        self._group_ids.append(prompt.split_group or prompt.prompt_id)
        self._is_heldout.append(prompt.split == "heldout")


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+|[^\w\s.,;:!?'\"‘’“”…–—]", text.casefold()) or [text]
    # Padding lets the first and the last word occur in as many shingles as any other.
    padding = [""] * (SHINGLE_WORDS - 1)
    words = [*padding, *words, *padding]
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}

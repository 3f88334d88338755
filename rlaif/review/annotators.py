"""Annotators: their names, their personal links, and the number of labels per pair.

Contract: a link holds a 144-bit token derived from the run's secret and the annotator's name. So links survive
restarts, and no one can forge another annotator's link. The secret is in ``RUN/.review-secret``, readable by its owner
only; deleting it replaces all links. Tokens are compared in constant time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from rlaif.config.models import ReviewConfig
from rlaif.errors import RunError
from rlaif.records import hash_to_unit_interval
from rlaif.review.queue import Role, normalize_annotator_name

SECRET_FILE = ".review-secret"  # noqa: S105


@dataclass(frozen=True, slots=True)
class Annotator:
    name: str
    role: Role

    @property
    def is_lead(self) -> bool:
        return self.role == "adjudicator"


@dataclass(frozen=True, slots=True)
class AssignmentRules:
    """Number of labels per pair.

    Each pair gets ``labels_per_pair`` labels, and a fraction ``extra_label_fraction`` of the pairs gets one more.
    ``gold_fraction`` of the pairs that an annotator sees are gold pairs.
    """

    labels_per_pair: int = 1
    extra_label_fraction: float = 0.0
    gold_fraction: float = 0.0

    def required_labels(self, seed: int, pair_id: str) -> int:
        """Return how many annotators label this pair; the same for the same seed."""
        return self.labels_per_pair + (hash_to_unit_interval(seed, "overlap", pair_id) < self.extra_label_fraction)


class AnnotatorRegistry:
    """The annotators and the lead, who may open the page.

    ``without_links``: one annotator on this machine, who needs no personal link."""

    def __init__(self, secret: bytes, annotators: list[str], lead: str, *, links: bool) -> None:
        self._secret = secret
        self.annotators = [Annotator(normalize_annotator_name(name), "annotator") for name in annotators]
        self.lead = Annotator(normalize_annotator_name(lead), "adjudicator")
        self.without_links = not links

    def link_token(self, annotator: Annotator) -> str:
        return self._sign("link", annotator)

    def csrf_token(self, annotator: Annotator) -> str:
        return self._sign("csrf", annotator)

    def find_by_token(self, token: str) -> Annotator | None:
        """Return the annotator or lead whose link holds ``token``, or None."""
        match = None
        for annotator in (*self.annotators, self.lead):  # no early exit: the time must not depend on the match
            if hmac.compare_digest(self.link_token(annotator).encode(), token.encode("utf-8", "replace")):
                match = annotator
        return match

    def is_valid_csrf_token(self, annotator: Annotator, token: str) -> bool:
        return hmac.compare_digest(self.csrf_token(annotator).encode(), token.encode("utf-8", "replace"))

    def _sign(self, purpose: str, annotator: Annotator) -> str:
        digest = hmac.new(
            self._secret, f"{purpose}\x1f{annotator.role}\x1f{annotator.name}".encode(), hashlib.sha256
        ).digest()
        return base64.urlsafe_b64encode(digest[:18]).decode()


def load_registry(run: Path, config: ReviewConfig, *, annotator: str | None, links: bool) -> AnnotatorRegistry:
    """Return the annotators of ``config``, or ``annotator`` alone.

    Links are required if ``links`` is set or ``config`` lists annotators. Raises :class:`RunError` if the secret cannot
    be read or written."""
    names = [annotator] if annotator else config.annotators or ["reviewer"]
    uses_config_names = not annotator and bool(config.annotators)
    return AnnotatorRegistry(_load_secret(run), names, config.lead, links=links or uses_config_names)


def _load_secret(run: Path) -> bytes:
    path = run / SECRET_FILE
    try:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            secret = path.read_bytes()
            if len(secret) >= 32:
                return secret
            path.unlink()  # the process that created it was stopped before it wrote the secret
            return _load_secret(run)
        with os.fdopen(fd, "wb") as file:
            secret = secrets.token_bytes(32)
            file.write(secret)
            return secret
    except OSError as error:
        raise RunError(
            f"cannot be read or written: {error.strerror}",
            location=str(path),
            hint="Fix its permissions, or delete it.",
        ) from None

"""Who labels: names, the links by which they come, and how often a pair is shown.

Contract: a link holds a token of 144 bits made from the run's secret and the person's name, so links stay the same
over restarts, and nobody can make another's. The secret lies in ``RUN/.review-secret`` and only its owner may read it;
to make all links anew, delete it. Tokens are compared in constant time.
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
    """How often a pair is shown. ``labels_per_pair`` people label each pair, and of a share of ``extra_label_fraction``
    one more."""

    labels_per_pair: int = 1
    extra_label_fraction: float = 0.0
    gold_fraction: float = 0.0

    def required_labels(self, seed: int, pair_id: str) -> int:
        return self.labels_per_pair + (hash_to_unit_interval(seed, "overlap", pair_id) < self.extra_label_fraction)


class AnnotatorRegistry:
    """Those who may open the page. ``without_links`` is one annotator on this machine, who needs no link."""

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
        match = None
        for annotator in (*self.annotators, self.lead):  # all of them, so that the time tells nothing
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
    """The people of ``config``, or ``annotator`` alone. Links are needed where there are several, or ``links``."""
    names = [annotator] if annotator else config.annotators or ["reviewer"]
    several = not annotator and bool(config.annotators)
    return AnnotatorRegistry(_load_secret(run), names, config.lead, links=links or several)


def _load_secret(run: Path) -> bytes:
    path = run / SECRET_FILE
    try:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            secret = path.read_bytes()
            if len(secret) >= 32:
                return secret
            path.unlink()  # its writer was stopped in between
            return _load_secret(run)
        with os.fdopen(fd, "wb") as file:
            secret = secrets.token_bytes(32)
            file.write(secret)
            return secret
    except OSError as error:
        raise RunError(
            f"cannot be read or written: {error.strerror}",
            location=str(path),
            hint="Mend its permission, or delete it.",
        ) from None

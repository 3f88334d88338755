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

from rlaif.config import ReviewConfig
from rlaif.errors import RunError
from rlaif.records import unit_interval
from rlaif.review.queue import Role, annotator_name

SECRET_NAME = ".review-secret"  # noqa: S105


@dataclass(frozen=True, slots=True)
class Person:
    name: str
    role: Role

    @property
    def is_lead(self) -> bool:
        return self.role == "adjudicator"


@dataclass(frozen=True, slots=True)
class Rules:
    """How often a pair is shown. ``labels`` people label each pair, and of a share of ``overlap`` one more."""

    labels: int = 1
    overlap: float = 0.0
    gold_share: float = 0.0

    def wanted(self, seed: int, pair_id: str) -> int:
        return self.labels + (unit_interval(seed, "overlap", pair_id) < self.overlap)


class People:
    """Those who may open the page. ``open`` is one annotator on this machine, who needs no link."""

    def __init__(self, secret: bytes, annotators: list[str], lead: str, *, links: bool) -> None:
        self._secret = secret
        self.annotators = [Person(annotator_name(name), "annotator") for name in annotators]
        self.lead = Person(annotator_name(lead), "adjudicator")
        self.open = not links

    def token(self, person: Person) -> str:
        return self._sign("link", person)

    def csrf(self, person: Person) -> str:
        return self._sign("csrf", person)

    def by_token(self, token: str) -> Person | None:
        found = None
        for person in (*self.annotators, self.lead):  # all of them, so that the time tells nothing
            if hmac.compare_digest(self.token(person).encode(), token.encode("utf-8", "replace")):
                found = person
        return found

    def is_csrf(self, person: Person, given: str) -> bool:
        return hmac.compare_digest(self.csrf(person).encode(), given.encode("utf-8", "replace"))

    def _sign(self, what: str, person: Person) -> str:
        digest = hmac.new(self._secret, f"{what}\x1f{person.role}\x1f{person.name}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest[:18]).decode()


def people_of(run: Path, config: ReviewConfig, *, annotator: str | None, links: bool) -> People:
    """The people of ``config``, or ``annotator`` alone. Links are needed where there are several, or ``links``."""
    names = [annotator] if annotator else config.annotators or ["reviewer"]
    several = not annotator and bool(config.annotators)
    return People(_secret(run), names, config.lead, links=links or several)


def _secret(run: Path) -> bytes:
    path = run / SECRET_NAME
    try:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            secret = path.read_bytes()
            if len(secret) >= 32:
                return secret
            path.unlink()  # its writer was stopped in between
            return _secret(run)
        with os.fdopen(fd, "wb") as file:
            secret = secrets.token_bytes(32)
            file.write(secret)
            return secret
    except OSError as error:
        raise RunError(
            f"cannot be read or written: {error.strerror}", where=str(path), mend="Mend its permission, or delete it."
        ) from None

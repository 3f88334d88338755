"""The API key: read from the environment, sent in the request header, and kept out of every message."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from rlaif.errors import EndpointError, UsageError
from rlaif.records import replace_surrogates

API_KEY_VARIABLES = ("RLAIF_API_KEY", "OPENAI_API_KEY")
MAX_EXCERPT_CHARS = 500


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, or None if the server needs none. Its value is not part of the repr."""

    value: str | None = field(repr=False)

    @classmethod
    def from_environment(cls) -> ApiKey:
        """Read the first of :data:`API_KEY_VARIABLES` that is set. Raises :class:`UsageError` if no header can carry
        it."""
        for name in API_KEY_VARIABLES:
            key = os.environ.get(name, "").strip()
            if key and not re.fullmatch(r"[!-~]+", key):
                raise UsageError(
                    f"the API key in {name} contains characters that no HTTP header can carry",
                    hint=f"Set it again: `export {name}=...`",
                )
            if key:
                return cls(key)
        return cls(None)

    def redact(self, text: str) -> str:
        """Replace the key in ``text`` by ``***``: servers often quote the key that they were given."""
        return replace_surrogates(text.replace(self.value, "***") if self.value else text)

    def excerpt(self, text: str) -> str:
        """Return the start of ``text`` without the key. Redacting comes first: a cut could leave a part of the key."""
        return self.redact(text)[:MAX_EXCERPT_CHARS]

    def rejected_error(self, url: str, status: int) -> EndpointError:
        """Build the error for a key that the server at ``url`` rejected, or for a missing one."""
        message = "the API key was rejected" if self.value else "the server requires an API key, and none is set"
        preferred, usual = API_KEY_VARIABLES
        return EndpointError(
            f"{message} (HTTP {status})",
            location=url,
            hint=f"Set the key: `export {usual}=...` (`{preferred}` takes precedence).",
        )

"""The notification at the end of ``rlaif run``: one line to a webhook, to a command, or to both."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from typing import Any

from rlaif.config.models import RunConfig
from rlaif.errors import UsageError
from rlaif.llm.pricing import is_local

NOTIFY_TIMEOUT_S = 30.0


def check_notification(config: RunConfig) -> None:
    """Validate ``notify_url`` and ``notify_command`` without using them. Raises :class:`UsageError`."""
    if config.notify_url and not config.notify_url.startswith(("http://", "https://")):
        raise UsageError(
            "`notify_url` is not an http:// or https:// URL",
            location="run.notify_url",
            hint="Correct it under [run] in rlaif.toml.",
        )
    if config.notify_command:
        try:
            program = shlex.split(config.notify_command)[:1]
        except ValueError as error:
            raise UsageError(
                f"`notify_command` is not a valid command line: {error}",
                location="run.notify_command",
                hint="Correct it under [run] in rlaif.toml.",
            ) from None
        if not program or shutil.which(program[0]) is None:
            raise UsageError(
                f"command {' '.join(program)!r} was not found",
                location="run.notify_command",
                hint="Install it, or correct `notify_command` under [run] in rlaif.toml.",
            )


def notify(config: RunConfig, line: str, details: dict[str, Any]) -> list[str]:
    """Send ``line`` to the webhook and the command of [run]. Returns one line per failure; raises nothing.

    The webhook receives ``{"text": line, **details}`` as JSON. The command receives ``line`` as its last argument.
    """
    failures = []
    if config.notify_url and (failure := _post_to_webhook(config.notify_url, line, details)):
        failures.append(failure)
    if config.notify_command and (failure := _run_command(config.notify_command, line)):
        failures.append(failure)
    return failures


def _post_to_webhook(url: str, line: str, details: dict[str, Any]) -> str | None:
    body = json.dumps({"text": line, **details}).encode()
    request = urllib.request.Request(  # noqa: S310  `check_notification` allows http and https only
        url, body, {"Content-Type": "application/json"}
    )
    handlers = [urllib.request.ProxyHandler({})] if is_local(url) else []
    try:
        urllib.request.build_opener(*handlers).open(request, timeout=NOTIFY_TIMEOUT_S).close()
    except (OSError, ValueError) as error:  # the message omits the URL: it may be a secret
        reason = error.code if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        return f"the webhook of `notify_url` failed ({reason})"
    return None


def _run_command(command: str, line: str) -> str | None:
    try:
        subprocess.run(
            [*shlex.split(command), line],
            check=True,
            capture_output=True,
            text=True,
            timeout=NOTIFY_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env=_environment_without_keys(),
        )
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout or "").strip().splitlines()
        last_line = f": {output[-1][:200]}" if output else ""
        return f"`notify_command` failed with exit code {error.returncode}{last_line}"
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"`notify_command` failed ({type(error).__name__})"
    return None


def _environment_without_keys() -> dict[str, str]:
    from rlaif.llm.api_key import API_KEY_VARIABLES

    return {name: value for name, value in os.environ.items() if name not in API_KEY_VARIABLES}

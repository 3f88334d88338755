"""Diagnosis of a server that ended, from its log: the reason and a hint."""

from __future__ import annotations

import re
from pathlib import Path

from rlaif.errors import did_you_mean

# The prefix of a message: process name, level, time and position in the code.
LOG_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:(?:ERROR|CRITICAL) [^\[]*\[[^\]]*\] )?")
ERROR_LINE = re.compile(r"^(?:[\w.]*(?:Error|Exception)|\S+: error): (.+)")
# Errors that are consequences of an earlier one in the log.
CONSEQUENTIAL_ERRORS = ("See root cause above", "EngineDeadError", "Worker failed with error", "validation error")


def failure_reason(log: Path, start: int = 0) -> str:
    """Return the reason why a server ended, from its log after byte ``start``.

    The reason is the last error that is not the consequence of another one.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 262144))
            lines = [LOG_PREFIX.sub("", line) for line in file.read().decode("utf-8", "replace").splitlines()]
    except OSError:
        return "no log"
    lines = [re.sub(r"^  Value error, ", "ValueError: ", line) for line in lines]  # pydantic's
    errors = [line for line in lines if ERROR_LINE.match(line)]
    causes = [line for line in errors if not any(words in line for words in CONSEQUENTIAL_ERRORS)]
    nonempty = [line for line in lines if line.strip()]
    line = (causes or errors or nonempty or ["no output"])[-1]
    return re.sub(r"^\S+: (?=error: )", "", line).strip()[:300] + _suggest_setting(line, lines)


def _suggest_setting(line: str, lines: list[str]) -> str:
    """Return a suggestion for an unknown setting, from the usage that vLLM prints above the error; "" without one."""
    unknown = re.search(r"unrecognized arguments: --([\w-]+)", line)
    if not unknown:
        return ""
    settings = {
        flag.replace("-", "_")
        for usage_line in lines
        if usage_line != line
        for flag in re.findall(r"--([a-z][a-z0-9-]+)", usage_line)
    }
    suggestion = did_you_mean(unknown[1].replace("-", "_"), settings)
    return f". {suggestion}" if suggestion.startswith("Did") else ""


def is_retryable(reason: str) -> bool:
    """Return True if another start may succeed: after a taken port or a sudden death, but not after a logged error or a
    timeout of the health check."""
    transient = "in use" in reason or "ended by signal" in reason
    return transient or ("not healthy" not in reason and "rror" not in reason)


def failure_hint(reason: str) -> str:
    """Return one action that may fix the reason of a failure."""
    text = reason.lower()
    if "memory" in text or "kv cache" in text or "max seq len" in text or "signal 9" in text:
        return "Lower `max_model_len` or `gpu_memory_utilization` in `[sampler.vllm]` or `[judge.vllm]`."
    if any(words in text for words in ("valid model identifier", "repository", "repo id", "offline", "huggingface")):
        return "Check the model's name or path: it is neither on this machine nor on the hub."
    if "unrecognized arguments" in text or "error: argument" in text or "max_model_len" in text:
        return "Fix the settings in `[sampler.vllm]` or `[judge.vllm]`."
    if "does not answer" in text:
        return "Read the log. If the server is only slow, raise `timeout_s` or lower `concurrency` in `[client]`."
    return "Read the log, then rerun the same command to start the server again."

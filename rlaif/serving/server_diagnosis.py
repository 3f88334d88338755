"""Why a server ended, by its log, and what a person can do about it."""

from __future__ import annotations

import re
from pathlib import Path

from rlaif.errors import did_you_mean

# Before what is said: the process's name, the level, the time and the place in the code.
LOG_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:(?:ERROR|CRITICAL) [^\[]*\[[^\]]*\] )?")
ERROR_LINE = re.compile(r"^(?:[\w.]*(?:Error|Exception)|\S+: error): (.+)")
# What follows from another error, which stands above it.
CONSEQUENTIAL_ERRORS = ("See root cause above", "EngineDeadError", "Worker failed with error", "validation error")


def failure_reason(log: Path, start: int = 0) -> str:
    """Why a server ended, by its log from byte ``start`` on: the last error that is not the consequence of another."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 262144))
            lines = [LOG_PREFIX.sub("", line) for line in file.read().decode("utf-8", "replace").splitlines()]
    except OSError:
        return "no log was written"
    lines = [re.sub(r"^  Value error, ", "ValueError: ", line) for line in lines]  # pydantic's
    errors = [line for line in lines if ERROR_LINE.match(line)]
    causes = [line for line in errors if not any(words in line for words in CONSEQUENTIAL_ERRORS)]
    nonempty = [line for line in lines if line.strip()]
    line = (causes or errors or nonempty or ["it said nothing"])[-1]
    return re.sub(r"^\S+: (?=error: )", "", line).strip()[:300] + _suggest_setting(line, lines)


def _suggest_setting(line: str, lines: list[str]) -> str:
    """For a setting that vLLM does not know: the closest of those that its usage, above the error, lists."""
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
    """A taken port or a sudden death may pass; an error that was told, or no health in all that time, will not."""
    transient = "in use" in reason or "ended by signal" in reason
    return transient or ("not healthy" not in reason and "rror" not in reason)


def failure_hint(reason: str) -> str:
    text = reason.lower()
    if "memory" in text or "kv cache" in text or "max seq len" in text or "signal 9" in text:
        return "Give it less: max_model_len or gpu_memory_utilization under [sampler.vllm] or [judge.vllm]."
    if any(words in text for words in ("valid model identifier", "repository", "repo id", "offline", "huggingface")):
        return "Check the model's name or path; nothing of that name is on this machine or the hub."
    if "unrecognized arguments" in text or "error: argument" in text or "max_model_len" in text:
        return "Mend what stands under [sampler.vllm] or [judge.vllm]."
    if "does not answer" in text:
        return "Read the log. If it only takes long: raise timeout_s, or lower concurrency, under [client]."
    return "Read the log; the same command starts it again."

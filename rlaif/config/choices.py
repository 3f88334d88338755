"""The values of the settings that have a fixed choice of them, for the settings and for the flags.

This module imports nothing heavy: the command line needs it for `--help`.
"""

from __future__ import annotations

from typing import Literal

OnBadRow = Literal["stop", "skip"]
Strategy = Literal["auto", "rate-then-compare", "round-robin", "rate-only"]
OutputMode = Literal["auto", "choice", "logprobs", "json"]
TrainMethod = Literal["dpo", "kto", "sft", "reward", "rloo", "ppo"]
DataType = Literal["auto", "float32", "bfloat16"]
Launcher = Literal["none", "accelerate"]
Sharding = Literal["fsdp", "deepspeed", "ddp"]
Backend = Literal["local", "ray"]

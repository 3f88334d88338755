"""The demo's night on a local Ray cluster of two real vLLMs, one of which is killed, beside the plain one."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(1200)]

SETTINGS = """
[prompts]
source = ["everyday"]
limit = 12
heldout_share = 0.0

[sampler]
model = ["demo"]
n = 3
max_tokens = 48
vllm = {max_model_len = 2048, max_num_seqs = 32}

[judge]
model = "demo"
trust_anyway = true
vllm = {max_model_len = 2048, max_num_seqs = 32}

[pairs]
min_probability = 0.5
min_margin = 0.0
min_score = 0.0
tries = 3
human_share = 0.0

[run]
pilot = 0

[client]
concurrency = 8
"""
ON_RAY = '\n[cluster]\non = "ray"\nreplicas = 2\n'

"""The peers of ``speed.py judge --peers``: curator and distilabel, each in a temporary environment.

They get the same messages, the same server and the same concurrency. Neither can constrain a server to a list of words,
so that part of the bodies is omitted. curator requests no probabilities.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

CURATOR = """
import importlib.util, json, os, sys
url, bodies, home, concurrency = sys.argv[1:]
# It would download a file to count tokens; litellm contains that file.
tokenizers = importlib.util.find_spec("litellm").submodule_search_locations[0] + "/litellm_core_utils/tokenizers"
os.environ.setdefault("TIKTOKEN_CACHE_DIR", tokenizers)
os.environ.update(CURATOR_DISABLE_CACHE="true", CURATOR_VIEWER="0", TELEMETRY_ENABLED="0", HF_HUB_OFFLINE="1")
from bespokelabs import curator

class Judge(curator.LLM):
    def prompt(self, row):
        return json.loads(row["messages"])
    def parse(self, row, response):
        return {"reply": response}

if __name__ == "__main__":
    rows = [{"messages": json.dumps(json.loads(line)["messages"])} for line in open(bodies)]
    judge = Judge(model_name="m", backend="openai", generation_params={"max_tokens": 1, "temperature": 0.0},
        backend_params={"base_url": url, "api_key": "none", "max_concurrent_requests": int(concurrency),
                        "max_requests_per_minute": 10**7, "max_tokens_per_minute": 10**10,
                        "invalid_finish_reasons": []})
    got = judge(rows, working_dir=home)
    print("answers:", len(getattr(got, "dataset", got)))
"""

DISTILABEL = """
import json, os, sys
url, bodies, home, concurrency = sys.argv[1:]
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=home)
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration

if __name__ == "__main__":
    rows = []
    for line in open(bodies):
        texts = {message["role"]: message["content"] for message in json.loads(line)["messages"]}
        rows.append({"instruction": texts["user"], "system_prompt": texts.get("system", "")})
    with Pipeline("judge", cache_dir=home) as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=int(concurrency))
        task = TextGeneration(llm=OpenAILLM(model="m", base_url=url, api_key="none",
            generation_kwargs={"max_new_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}),
            input_batch_size=int(concurrency))
        load >> task
    print("answers:", len(pipeline.run(use_cache=False)["default"]["train"]))
"""

PEERS = {
    "curator": (["bespokelabs-curator==0.1.31"], CURATOR),
    "distilabel": (["distilabel[openai]==1.5.3", "requests"], DISTILABEL),  # it imports requests without declaring it
}
INSTALL_S, RUN_S = 180, 120


def install_peers(folder: Path) -> dict[str, list[str]]:
    """Return the command of each peer that can be installed. Prints the reason for the others."""
    commands = {}
    uv = Path(sys.executable).parent / "uv"
    for name, (packages, script) in PEERS.items():
        home = folder / name
        python = home / "bin" / "python"
        # uv does not read pip's setting of folders with wheels.
        environment = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""), **os.environ}
        for arguments in (
            ["venv", home, "--python", sys.executable],
            ["pip", "install", "--python", python, *packages],
        ):
            try:
                subprocess.run(
                    [uv, *arguments], check=True, capture_output=True, text=True, timeout=INSTALL_S, env=environment
                )
            except (OSError, subprocess.SubprocessError) as error:
                print(f"{name} cannot be installed: {str(getattr(error, 'stderr', '') or error).strip()[-300:]}")
                break
        else:
            (home / "judge.py").write_text(script)
            commands[f"{name} {packages[0].partition('==')[2]}"] = [str(python), str(home / "judge.py")]
    return commands


def measure_rate(
    name: str, command: list[str], url: str, bodies: Path, home: Path, requests: int, concurrency: int
) -> float:
    """Return requests/s of the peer's whole process, or 0.0 if it fails. Prints the reason of a failure."""
    home.mkdir()
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, url, str(bodies), str(home), str(concurrency)],
            capture_output=True,
            text=True,
            timeout=RUN_S,
            cwd=home,
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: timed out after {RUN_S} s")
        return 0.0
    if f"answers: {requests}" not in done.stdout:
        print(f"{name} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return 0.0
    return requests / (time.monotonic() - began)

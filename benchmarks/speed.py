"""Speed, memory and scale: python -m benchmarks.speed judge|reopen|pairs|memory|prefix|sampling|facts

Each benchmark prints ratios within one run, with the facts of the machine. benchmarks/speed.md has the tables and the
commands that reproduce them. ``serve`` and ``bare`` are helper processes of ``judge``: a server that answers after
50 ms, and the openai package on its aiohttp transport, called with the same bodies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import speed_peers

ROOT = Path(__file__).resolve().parent.parent
SELF = (sys.executable, "-m", "benchmarks.speed")
CONCURRENCY = 256
DELAY_S = 0.05
GIB = 2**30


# Server


def reply_body() -> bytes:
    tokens = [{"token": "A", "logprob": -0.2, "bytes": [65]}, {"token": "B", "logprob": -1.7, "bytes": [66]}]
    tokens += [{"token": f"t{i}", "logprob": -9.0 - i, "bytes": [116]} for i in range(18)]
    content = [{**tokens[0], "top_logprobs": tokens}]
    return json.dumps({
        "id": "chatcmpl-0123456789abcdef", "object": "chat.completion", "created": 1_700_000_000, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "A"}, "finish_reason": "length",
                     "logprobs": {"content": content}}],
        "usage": {"prompt_tokens": 400, "completion_tokens": 1, "total_tokens": 401,
                  "prompt_tokens_details": {"cached_tokens": 256}},
    }).encode()  # fmt: skip


class Protocol(asyncio.Protocol):
    """A minimal HTTP server that is not a bottleneck for the clients."""

    def __init__(self, models: bytes, reply: bytes) -> None:
        self.models, self.reply, self.buffer = models, reply, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            position = head.find(b"content-length:")
            length = int(head[position + 15 :].split(b"\r\n", 1)[0]) if position >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            if head.startswith(b"get"):
                self.transport.write(self.models)
            else:
                asyncio.get_running_loop().call_later(DELAY_S, self._answer)

    def _answer(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self.reply)


async def serve(port: int) -> None:
    def http(body: bytes) -> bytes:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    models = http(json.dumps({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}).encode())
    reply = http(reply_body())
    server = await asyncio.get_running_loop().create_server(
        lambda: Protocol(models, reply), "127.0.0.1", port, backlog=1024
    )
    await server.serve_forever()


class Server:
    """The 50 ms server in its own process."""

    def __enter__(self) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.process = subprocess.Popen([*SELF, "serve", str(port)])
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        return f"http://127.0.0.1:{port}/v1"

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


# Runs


WORDS = "the answer to this is that one has to look at how it was asked before saying what it is".split()  # noqa: SIM905


def text(seed: int, length: int = 60) -> str:
    return " ".join(WORDS[(seed * 7 + i * 3) % len(WORDS)] for i in range(length)) + f" ({seed})"


def import_run(folder: Path, prompts: int, answers: int = 2) -> Path:
    """Create a run of imported prompts and answers."""
    source = folder / "rows.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for i in range(prompts):
            row = {
                "id": f"p{i}",
                "prompt": f"Question {i}: {text(i, 20)}",
                "responses": [text(i * answers + j) for j in range(answers)],
            }
            file.write(json.dumps(row) + "\n")
    run = folder / "run"
    rlaif("generate", run, "--import", source)
    source.unlink()
    return run


def rlaif(*arguments: str | Path) -> tuple[float, float, str]:
    """Run a command. Returns (seconds, peak GiB, stderr)."""
    began = time.monotonic()
    process = subprocess.Popen(
        ["/usr/bin/env", "python", "-m", "rlaif", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert process.stderr
    stderr = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        sys.exit(f"{arguments}: exit {process.returncode}\n{stderr}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20, stderr


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def print_machine() -> None:
    load = os.getloadavg()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, "
        f"load before {load:.1f}"
    )


# Judging


async def bare(url: str, bodies: list[dict[str, Any]]) -> None:
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=openai.DefaultAioHttpClient())
    remaining = iter(bodies)

    async def work() -> None:
        for body in remaining:
            extra = {name: body.pop(name) for name in ("structured_outputs",) if name in body}
            await client.chat.completions.create(model="m", extra_body=extra, **body)

    async with client:
        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))


def judge(requests: int, times: int, *, peers: bool) -> None:
    """Measure whole commands, from process start to end, including imports, rendering, journal, pairs and dataset."""
    ours, theirs = [], []
    others: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, Server() as url:
        full_run = import_run(Path(folder), requests // 2)
        bodies = Path(folder) / "bodies.jsonl"
        write_bodies(full_run, bodies)
        commands = speed_peers.install_peers(Path(folder)) if peers else {}
        for index in range(times):
            run = Path(folder) / f"run{index}"
            shutil.copytree(full_run, run)
            seconds, _, _ = rlaif(
                "judge", run, "--judge", "helpful", "--model", "m", "--base-url", url, "--concurrency", str(CONCURRENCY)
            )
            ours.append(requests / seconds)
            began = time.monotonic()
            subprocess.run([*SELF, "bare", url, bodies], check=True, env=environment())
            theirs.append(requests / (time.monotonic() - began))
            for name, command in commands.items():
                home = Path(folder) / f"{name}-{index}"
                rate = speed_peers.measure_rate(name, command, url, bodies, home, requests, CONCURRENCY)
                others.setdefault(name, []).append(rate)
    for name, rates in {"rlaif judge, whole command": ours, "openai on aiohttp, bare script": theirs, **others}.items():
        print(f"{name:<34}{format_spread(rates)} requests/s")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{'ratio to bare openai':<34}{format_spread(ratios)}  (n={times} runs of {requests:,} requests)")
    for name, rates in others.items():
        if all(rates):
            print(f"{'ratio to ' + name:<34}{format_spread([a / b for a, b in zip(ours, rates, strict=True)])}")


def write_bodies(run: Path, path: Path) -> None:
    """Write the request bodies that ``rlaif judge`` will send."""
    from rlaif.config.loader import load
    from rlaif.judge import runner
    from rlaif.labeling.judging import JudgingRounds, load_panel, resolve_strategy
    from rlaif.llm.usage import UsageMeter
    from rlaif.run.journal import JournalReader
    from rlaif.run.run import Run

    config = load(run, {"judge.panel": ["helpful"], "judge.model": "m"})
    panel_judges = load_panel(config)
    rounds = JudgingRounds(
        Run(run), config, None, panel_judges, resolve_strategy(config, panel_judges), None, UsageMeter()
    )
    prompts, answers = (JournalReader(run / "journal" / f"{name}.jsonl") for name in ("prompts", "completions"))
    work = [runner.JudgeInput(*row) for row in rounds.possible_inputs("compare").rows()]
    with path.open("w") as file:
        for request in runner.judge_requests(panel_judges[0], "choice", config, work, prompts.read_at, answers.read_at):
            file.write(json.dumps(request.body) + "\n")


def format_spread(values: list[float]) -> str:
    """Return the median with minimum and maximum."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    formatted = [f"{value:,.0f}" if middle >= 10 else f"{value:.2f}" for value in (middle, ordered[0], ordered[-1])]
    return f"{formatted[0]} ({formatted[1]} to {formatted[2]})"


# Large runs, written as journals


JUDGE = """name = "score"
version = "1"
kind = "rate"
[[aspects]]
name = "overall"
text = "How good is it?"
"""
JUDGE_PROMPT = "# System\nYou rate.\n# User\n{conversation}\n{reference}\n{response}\n{aspect}\n{reply}\n"


def write_run(run: Path, prompts: int, answers: int, *, verdicts: bool) -> None:
    """Write a run with ``prompts`` x ``answers`` sampled completions and optionally one score per completion."""
    from hashlib import sha256

    from rlaif.config.loader import load
    from rlaif.judge.runner import settings_hash
    from rlaif.labeling.judging import load_panel

    journal, score = run / "journal", run / "score"
    journal.mkdir(parents=True)
    score.mkdir()
    (score / "judge.toml").write_text(JUDGE)
    (score / "prompt.md").write_text(JUDGE_PROMPT)
    (run / "rlaif.toml").write_text(
        f'[judge]\npanel = ["{score}"]\nmodel = "m"\nstrategy = "rate-only"\noutput_mode = "choice"\n'
    )
    config = load(run, {})
    (judge,) = load_panel(config)
    judge_hash, asked_as = judge.definition.hash, settings_hash(judge, "choice", config)
    usage = '"cost_usd":0.0,"created_at":1700000000.0}\n'
    with (
        (journal / "prompts.jsonl").open("w") as prompt_file,
        (journal / "completions.jsonl").open("w") as completion_file,
        (journal / "verdicts.jsonl").open("w") as verdict_file,
    ):
        for i in range(prompts):
            key = sha256(f"p{i}".encode()).hexdigest()
            row = {
                "key": key,
                "prompt_id": key[:16],
                "checks": [],
                "tags": [],
                "split": "train",
                "source": "rows:1",
                "messages": [{"role": "user", "content": f"Question {i}: {text(i, 12)}"}],
            }
            prompt_file.write(json.dumps(row) + "\n")
            for j in range(answers):
                answer = sha256(f"c{i}-{j}".encode()).hexdigest()
                completion_file.write(
                    f'{{"key":"{answer}","prompt_id":"{key[:16]}","index":{j},"model":"m","finish_reason":"stop",'
                    f'"text":"{text(i * answers + j, 24)}","prompt_tokens":40,"completion_tokens":30,'
                    f'"source":"sampled",{usage}'
                )
                if verdicts:
                    rating = 1 + 4 * (int(answer[:6], 16) / 0xFFFFFF)
                    verdict_file.write(
                        f'{{"key":"{sha256(answer.encode()).hexdigest()}","kind":"rate","judge":"score","judge_hash":'
                        f'"{judge_hash}","model":"m","settings_hash":"{asked_as}","prompt_id":"{key[:16]}","a":"{answer}","aspect":"overall",'
                        f'"sample":0,"score":{rating:.4f},"variance":0.3,"verdict_mass":1.0,"reply":"4","flags":[],'
                        f'"prompt_tokens":400,"cached_tokens":256,"completion_tokens":1,{usage}'
                    )


def run_in_child(work: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Run ``work`` in a forked process and return (seconds, peak GiB)."""
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            work(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{work.__name__}: failed")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def _frames(run: Path) -> None:
    """Turn scored completions into aggregated and routed pairs, without writing texts."""
    from rlaif.config.loader import load
    from rlaif.labeling.judging import JudgingRounds, load_panel, resolve_strategy
    from rlaif.llm.usage import UsageMeter
    from rlaif.run.run import Run

    config = load(run, {})
    panel_judges = load_panel(config)
    candidates = JudgingRounds(
        Run(run), config, None, panel_judges, resolve_strategy(config, panel_judges), None, UsageMeter()
    ).judge_all()
    print(f"    {candidates.height:,} candidates")


def _whole(run: Path) -> None:
    """Do the same and write tables/pairs.parquet and the dataset."""
    from rlaif import api
    from rlaif.config.loader import load
    from rlaif.run.run import Run

    built = api.rebuild_dataset(Run(run), load(run, {}))
    print(f"    {built.dataset_counts.train + built.dataset_counts.test:,} rows in the dataset")


def pairs(prompts: int) -> None:
    for size in (prompts // 2, prompts):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            write_run(run, size, 4, verdicts=True)
            gb = sum(path.stat().st_size for path in (run / "journal").iterdir()) / 1e9
            for work in (_frames, _whole):
                seconds, peak = run_in_child(work, run)
                print(
                    f"{size:>9,} x 4 ({gb:.1f} GB of journals), {work.__name__[1:]:<7} {seconds:6.1f} s, "
                    f"{peak:.2f} GiB",
                    flush=True,
                )


def _open(run: Path) -> None:
    from rlaif.run.journal import Journal

    with Journal(run / "journal" / "completions.jsonl") as journal:
        print(f"    {len(journal.answered_keys):,} answers known")


def _answer_all(run: Path) -> None:
    """Write an answer for the key of each pending request of the run."""
    from rlaif.config.loader import load
    from rlaif.generate.sampling import pending_requests
    from rlaif.run.run import Run

    config = load(run, {"sampler.model": ["m"], "sampler.n": 1})
    with (run / "journal" / "completions.jsonl").open("w") as file:
        for index, request in enumerate(pending_requests(Run(run), config, 0, ())):
            file.write(
                f'{{"key":"{request.keys[0]}","prompt_id":"{request.prompt_id}","index":0,"model":"m","finish_reason":'
                f'"stop","text":"{text(index, 24)}","prompt_tokens":40,"completion_tokens":30,"source":"sampled",'
                '"cost_usd":0.0,"created_at":1700000000.0}\n'
            )


def _nothing_pending(run: Path) -> None:
    from rlaif.config.loader import load
    from rlaif.generate.sampling import _AnsweredOrFailed, pending_requests
    from rlaif.run.run import Run

    config = load(run, {"sampler.model": ["m"], "sampler.n": 1})
    with Run(run).journal("completions") as journal:
        print(f"    {sum(1 for _ in pending_requests(Run(run), config, 0, _AnsweredOrFailed(journal))):,} pending")


def reopen(requests: int) -> None:
    """Measure opening the journal of ``requests`` finished requests, and searching it for pending ones."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_run(run, requests, 1, verdicts=False)
        run_in_child(_answer_all, run)
        for work in (_open, _nothing_pending):
            seconds, peak = run_in_child(work, run)
            print(
                f"{requests:>9,} finished requests, {work.__name__[1:]:<15} {seconds:5.1f} s, {peak:.2f} GiB",
                flush=True,
            )


def memory(sizes: list[int]) -> None:
    """Measure the peak memory of whole ``rlaif judge`` commands with two requests per prompt."""
    with Server() as url:
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                write_run(run, size, 2, verdicts=False)
                (run / "rlaif.toml").unlink()
                seconds, peak, _ = rlaif(
                    "judge",
                    run,
                    "--judge",
                    "helpful",
                    "--model",
                    "m",
                    "--base-url",
                    url,
                    "--concurrency",
                    str(CONCURRENCY),
                )
                print(
                    f"{size:>9,} prompts: {seconds:7.1f} s ({2 * size / seconds:,.0f} requests/s), {peak:.2f} GiB",
                    flush=True,
                )


# Real vLLM


def generate_arguments(run: Path, prompts: int, *, max_tokens: int) -> tuple[str | Path, ...]:
    """Arguments of `rlaif generate`: four answers of the demo model to each of the first packaged prompts."""
    flags = f"--prompts everyday --limit {prompts} --model demo -n 4 --max-tokens {max_tokens}"
    return ("generate", run, *flags.split())


def prefix(prompts: int) -> None:
    """Measure the fraction of a judge's prompt tokens that a real vLLM reads from its prefix cache."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        rlaif(*generate_arguments(run, prompts, max_tokens=48))
        rlaif("judge", run, "--judge", "quality", "--judge", "helpful", "--model", "demo", "--max-failures", "1000")
        tokens = cached = count = 0
        for line in (run / "journal" / "verdicts.jsonl").read_text().splitlines():
            record = json.loads(line)
            if "error" not in record:
                count += 1
                tokens += record["prompt_tokens"]
                cached += record["cached_tokens"]
        print(f"{cached:,} of {tokens:,} prompt tokens of {count:,} verdicts from the cache: {cached / tokens:.3f}")


def sampling(prompts: int) -> None:
    """Compare ``rlaif generate`` with a running server to vLLM's own LLM.chat on the same prompts and settings."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = (*generate_arguments(run, prompts, max_tokens=64), "--heldout-fraction", "0")
        rlaif(*arguments)
        stage = json.loads((run / "manifest.json").read_text())["stages"]["generate"]["history"][0]
        ours = stage["completion_tokens"] / stage["request_wall_s"]
        done = subprocess.run([*SELF, "vllm", run], check=True, env=environment(), capture_output=True, text=True)
        theirs = float(done.stdout.rpartition("tokens/s: ")[2].split()[0])
        print(
            f"rlaif generate {ours:,.0f} tokens/s, bare vLLM {theirs:,.0f} tokens/s, ratio {ours / theirs:.3f} "
            f"(n=1 run, {prompts} prompts x 4)"
        )


def server_settings() -> dict[str, Any]:
    """Return the settings of the server that rlaif would start, parsed by vLLM, as arguments of vLLM's LLM."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rlaif.serving import vllm_server

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = vllm_server.vllm_args("demo", vllm_server.vllm_variant(), {})
    configured, defaults = (EngineArgs.from_cli_args(parser.parse_known_args(line)[0]) for line in (flags, flags[:2]))
    names = [field.name for field in fields(EngineArgs) if field.name != "served_model_name"]
    chosen = {name: getattr(configured, name) for name in names if getattr(configured, name) != getattr(defaults, name)}
    return {"model": configured.model, **chosen}


def bare_vllm(run: Path) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    messages = [json.loads(line)["messages"] for line in (run / "journal" / "prompts.jsonl").read_text().splitlines()]
    llm = LLM(**server_settings())
    settings = [SamplingParams(n=4, temperature=1.0, max_tokens=64, seed=i) for i in range(len(messages))]
    began = time.monotonic()
    outputs = llm.chat(messages, settings, use_tqdm=False)
    seconds = time.monotonic() - began
    print(f"tokens/s: {sum(len(choice.token_ids) for output in outputs for choice in output.outputs) / seconds}")


def iter_jsonl(path: str) -> Iterator[dict[str, Any]]:
    with Path(path).open() as file:
        yield from map(json.loads, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", help="Benchmark or helper process")
    parser.add_argument("arguments", nargs="*", help="Sizes and repetitions [default: those of benchmarks/speed.md]")
    parser.add_argument(
        "--peers", action="store_true", help="Also run curator and distilabel with judge, if they can be installed"
    )
    args = parser.parse_args()
    numbers = [int(argument) for argument in args.arguments if argument.isdigit()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    if args.benchmark not in ("serve", "bare", "vllm"):
        print_machine()
    match args.benchmark:
        case "serve":
            asyncio.run(serve(numbers[0]))
        case "bare":
            asyncio.run(bare(args.arguments[0], list(iter_jsonl(args.arguments[1]))))
        case "vllm":
            bare_vllm(Path(args.arguments[0]))
        case "judge":
            judge(*(numbers or [8000, 3]), peers=args.peers)
        case "pairs":
            pairs(*(numbers or [1_000_000]))
        case "reopen":
            reopen(*(numbers or [1_000_000]))
        case "memory":
            memory(numbers or [10_000, 100_000, 1_000_000])
        case "prefix":
            prefix(*(numbers or [60]))
        case "sampling":
            sampling(*(numbers or [60]))
        case "facts":
            pass
        case unknown:
            parser.error(f"unknown benchmark {unknown}")


if __name__ == "__main__":
    main()

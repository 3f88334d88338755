"""Sampling requests exactly the pending samples from the right model with reproducible seeds, and journals them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.config.loader import load
from rlaif.config.models import Config
from rlaif.errors import EndpointError
from rlaif.generate.ingest import ingest_prompts
from rlaif.generate.sampling import _split_usage, pending_requests, sample
from rlaif.llm.backends import ModelBackends
from rlaif.llm.usage import Usage, UsageMeter
from rlaif.run.run import Run
from tests.conftest import read_jsonl, write_jsonl
from tests.fake_server import Fault, ScriptedServer, echo, usage_of

Serve = Callable[..., ScriptedServer]
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
PROMPTS = [{"prompt": f"prompt number {i * 7919}"} for i in range(12)]


def run_with_prompts(folder: Path, rows: list[dict[str, Any]] = PROMPTS, **flags: Any) -> Run:
    """Create a run in ``folder`` and ingest ``rows``."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder / "run")
    source = write_jsonl(folder / "p.jsonl", rows)
    ingest_prompts(
        run,
        sampling_config(run, **{"prompts.sources": [str(source)], "prompts.heldout_fraction": 0.0, **flags}),
        lambda line: None,
    )
    return run


def sampling_config(run: Run, **flags: Any) -> Config:
    return load(run.path, {"sampler.model": ["m"], "sampler.n": 4, **flags}, {})


def run_sampling(run: Run, *urls: str, **flags: Any) -> UsageMeter:
    """Sample as one command does."""
    config, usage = sampling_config(run, **{"sampler.base_url": list(urls), **flags}), UsageMeter()
    with ModelBackends(run.log, config.client, lambda line: None) as engines:
        sample(run, config, engines, usage)
    return usage


def answers(run: Run) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run.journal_path("completions")) if "error" not in record]


def failures(run: Run) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run.journal_path("completions")) if "error" in record]


def texts(run: Run) -> set[tuple[str, int, str]]:
    return {(record["prompt_id"], record["index"], record["text"]) for record in answers(run)}


def seeds(server: ScriptedServer) -> Counter[tuple[str, int]]:
    """Count the requests for each (prompt, seed) at ``server``. A request for n samples has n consecutive seeds."""
    return Counter(
        (body["messages"][-1]["content"], body["seed"] + i) for body in server.requests for i in range(body["n"])
    )


# Requests


def test_a_request_has_all_settings(serve: Serve, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": None}}}]
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": CALLS},
            {"role": "tool", "content": "42", "tool_call_id": "1"}]  # fmt: skip
    server = serve(lambda body: ["a"] * body["n"])
    run = run_with_prompts(tmp_path, [{"prompt": talk, "tools": tools}])
    run_sampling(
        run, server.url, **{"sampler.temperature": 0.5, "sampler.top_p": 0.9, "sampler.max_tokens": 7, "sampler.n": 3}
    )
    (body,) = server.requests
    seed = body.pop("seed")
    assert isinstance(seed, int)
    assert 0 <= seed < 2**31 - 128
    assert body == {
        "model": "m",
        "messages": talk,
        "tools": tools,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "n": 3,
    }
    second_run = run_with_prompts(tmp_path / "again", PROMPTS[:1])
    run_sampling(second_run, server.url, **{"sampler.send_seed": False})
    assert "seed" not in server.requests[-1]
    assert "tools" not in server.requests[-1]


def test_each_prompt_gets_n_answers_in_one_request(serve: Serve, tmp_path: Path) -> None:
    server, run = serve(), run_with_prompts(tmp_path)
    usage = run_sampling(run, server.url)
    assert len(server.requests) == len(PROMPTS)
    assert Counter(record["prompt_id"] for record in answers(run)) == Counter({
        record["prompt_id"]: 4 for record in read_jsonl(run.journal_path("prompts"))})  # fmt: skip
    assert len(texts(run)) == len({record["key"] for record in answers(run)}) == 48
    assert {record["model"] for record in answers(run)} == {"m"}
    assert {record["source"] for record in answers(run)} == {"sampled"}
    assert usage.answers == 48


def test_no_sample_is_requested_twice(serve: Serve, tmp_path: Path) -> None:
    server, run = serve(), run_with_prompts(tmp_path)
    run_sampling(run, server.url)
    before = run.journal_path("completions").read_bytes()
    run_sampling(run, "http://127.0.0.1:9/v1")  # no server listens there
    assert run.journal_path("completions").read_bytes() == before


def test_held_out_prompts_are_never_sampled(serve: Serve, tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt number {i * 7919}"} for i in range(60)]
    server, run = serve(), run_with_prompts(tmp_path, rows, **{"prompts.heldout_fraction": 0.3})
    run_sampling(run, server.url)
    split = {record["messages"][0]["content"]: record["split"] for record in read_jsonl(run.journal_path("prompts"))}
    assert Counter(split.values())["heldout"] > 5
    assert {body["messages"][0]["content"] for body in server.requests} == {
        text for text, name in split.items() if name == "train"}  # fmt: skip


def test_a_larger_n_requests_only_the_additional_samples(serve: Serve, tmp_path: Path) -> None:
    """And they are the samples that a single command with the larger n would have given."""
    server, grown = serve(), run_with_prompts(tmp_path / "grown")
    for n in (1, 3, 8):
        run_sampling(grown, server.url, **{"sampler.n": n})
    assert Counter(body["n"] for body in server.requests) == {1: 12, 2: 12, 5: 12}
    once, at_once = serve(), run_with_prompts(tmp_path / "once")
    run_sampling(at_once, once.url, **{"sampler.n": 8})
    assert texts(grown) == texts(at_once)
    assert {record["key"] for record in answers(grown)} == {record["key"] for record in answers(at_once)}
    assert seeds(server) == seeds(once)


def test_a_request_has_the_seed_of_its_first_sample(serve: Serve, tmp_path: Path) -> None:
    """Samples that are missing are requested with the same seeds as in a request for all."""
    server, run = serve(), run_with_prompts(tmp_path, PROMPTS[:1])
    run_sampling(run, server.url, **{"sampler.n": 6})
    (first,) = server.requests
    path = run.journal_path("completions")
    expected, lines = texts(run), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[index] for index in (0, 3, 5)))
    run_sampling(run, server.url, **{"sampler.n": 6})
    assert [(body["seed"] - first["seed"], body["n"]) for body in server.requests[1:]] == [(1, 2), (4, 1)]
    assert texts(run) == expected


def test_the_key_depends_on_seed_model_and_sampling_settings(serve: Serve, tmp_path: Path) -> None:
    """Another seed, model, temperature, top_p or max_tokens gives another key; another URL or concurrency does not."""
    run = run_with_prompts(tmp_path, PROMPTS[:2])

    def keys(**flags: Any) -> set[str]:
        return {
            key for request in pending_requests(run, sampling_config(run, **flags), 0, set()) for key in request.keys
        }

    usual = keys()
    assert len(usual) == 8
    for flags in ({"seed": 1}, {"sampler.model": ["n"]}, {"sampler.temperature": 0.9}, {"sampler.top_p": 0.9},
                  {"sampler.max_tokens": 9}):  # fmt: skip
        assert keys(**flags).isdisjoint(usual), flags
    for flags in ({"sampler.base_url": ["http://x/v1"]}, {"client.concurrency": 1}, {"sampler.send_seed": False}):
        assert keys(**flags) == usual, flags


# A pool


@pytest.mark.parametrize(("models", "n"), [(2, 4), (3, 4), (3, 2), (2, 1), (3, 9)])
def test_a_pool_divides_the_samples_of_each_prompt(serve: Serve, tmp_path: Path, models: int, n: int) -> None:
    """Each prompt gets n samples, divided evenly, with one request per model. Over all prompts no model gives more."""
    names = ["a", "b", "c"][:models]
    server = serve(lambda body: [f"{body['model']} {text}" for text in echo(body)], models=tuple(names))
    rows = [{"prompt": f"prompt number {i * 7919}"} for i in range(60)]
    run = run_with_prompts(tmp_path, rows, **{"sampler.model": names})
    run_sampling(run, server.url, **{"sampler.model": names, "sampler.n": n})
    shares: dict[str, Counter[str]] = {}
    for record in answers(run):
        assert record["text"].startswith(record["model"] + " ")
        shares.setdefault(record["prompt_id"], Counter())[record["model"]] += 1
    assert len(shares) == 60
    for share in shares.values():
        assert share.total() == n
        assert max(share.values()) - min(share[name] for name in names) <= 1
    totals = sum(shares.values(), Counter[str]())
    assert all(abs(totals[name] - 60 * n / models) < 25 for name in names)
    assert max(Counter((body["model"], body["messages"][0]["content"]) for body in server.requests).values()) == 1
    assert len(texts(run)) == 60 * n
    second_run = run_with_prompts(tmp_path / "again", rows, **{"sampler.model": names})
    run_sampling(second_run, server.url, **{"sampler.model": names, "sampler.n": n})
    assert texts(second_run) == texts(run)


def test_a_pool_grows_like_one_model(serve: Serve, tmp_path: Path) -> None:
    server, names = serve(models=("a", "b")), ["a", "b"]
    grown, once = run_with_prompts(tmp_path / "grown"), run_with_prompts(tmp_path / "once")
    for n in (1, 2, 5):
        run_sampling(grown, server.url, **{"sampler.model": names, "sampler.n": n})
    run_sampling(once, server.url, **{"sampler.model": names, "sampler.n": 5})
    assert texts(grown) == texts(once)


def test_each_model_of_a_pool_has_its_own_server(serve: Serve, tmp_path: Path) -> None:
    """A model that is in the pool twice gives different samples each time."""
    one, two = serve(models=("a",)), serve(models=("b",))
    run = run_with_prompts(tmp_path)
    table = "".join(f'[[policies]]\nmodel = "{name}"\nbase_url = "{server.url}"\n' for name, server in
                    (("a", one), ("b", two), ("a", one)))  # fmt: skip
    (run.path / "rlaif.toml").write_text(table)
    config, usage = load(run.path, {"sampler.n": 6}, {}), UsageMeter()
    with ModelBackends(run.log, config.client, lambda line: None) as engines:
        sample(run, config, engines, usage)
    assert Counter(record["model"] for record in answers(run)) == {"a": 48, "b": 24}
    assert {body["model"] for body in one.requests} == {"a"}
    assert {body["model"] for body in two.requests} == {"b"}
    assert max(seeds(one).values()) == 1


# Replies


def test_a_server_that_ignores_n_still_gives_all_samples(serve: Serve, tmp_path: Path) -> None:
    """With one choice per request, there are n requests per prompt, and no sample is missing or repeated."""
    server = serve(lambda body: echo({**body, "n": 1}))
    run = run_with_prompts(tmp_path)
    usage = run_sampling(run, server.url)
    assert len(server.requests) == len(PROMPTS) * 4
    assert len(texts(run)) == len({record["key"] for record in answers(run)}) == len(answers(run)) == 48
    assert usage.failed == 0
    several, expected = serve(), run_with_prompts(tmp_path / "expected")
    run_sampling(expected, several.url)
    assert texts(run) == texts(expected)


def test_more_choices_than_requested_are_ignored(serve: Serve, tmp_path: Path) -> None:
    server, run = serve(lambda body: echo({**body, "n": body["n"] + 3})), run_with_prompts(tmp_path)
    run_sampling(run, server.url)
    assert sorted(Counter(record["prompt_id"] for record in answers(run)).values()) == [4] * 12


def refuse_prompts(*numbers: int) -> Callable[[dict[str, Any]], Any]:
    """Return a reply function that rejects the prompts with these numbers permanently."""
    return lambda body: (
        Fault(400) if int(body["messages"][-1]["content"].split()[-1]) // 7919 in numbers else echo(body)
    )


@pytest.mark.parametrize("one_choice", [False, True])
def test_a_failure_is_journaled_once_and_retried_by_the_next_command(
    serve: Serve, tmp_path: Path, one_choice: bool
) -> None:
    """The same command neither requests nor counts it again, even if other prompts need several rounds."""
    failing = refuse_prompts(3, 5)
    server = serve(lambda body: failing({**body, "n": 1} if one_choice else body))
    run = run_with_prompts(tmp_path)
    usage = run_sampling(run, server.url)
    assert usage.failed == 8
    assert len(failures(run)) == 8
    assert {record["kind"] for record in failures(run)} == {"endpoint"}
    assert len(answers(run)) == 40
    request_counts = Counter(body["messages"][-1]["content"] for body in server.requests)
    assert request_counts[PROMPTS[3]["prompt"]] == request_counts[PROMPTS[5]["prompt"]] == 1
    healthy = serve()
    usage = run_sampling(run, healthy.url)
    retried = {body["messages"][-1]["content"] for body in healthy.requests}
    assert retried == {PROMPTS[3]["prompt"], PROMPTS[5]["prompt"]}
    assert usage.failed == 0
    assert len(texts(run)) == 48
    assert run.completions().height == 48
    assert {record["key"] for record in failures(run)} < {record["key"] for record in answers(run)}


def test_a_wrong_model_is_an_error_before_the_first_request(serve: Serve, tmp_path: Path) -> None:
    server, run = serve(models=("good",)), run_with_prompts(tmp_path)
    with pytest.raises(EndpointError, match=r"has no model 'goood'\. Did you mean 'good'\?"):
        run_sampling(run, server.url, **{"sampler.model": ["goood"]})
    assert server.requests == []


def reply(*choices: dict[str, Any], usage: dict[str, int] | None = None) -> dict[str, Any]:
    return {"choices": [{"index": i, "finish_reason": "stop", **choice} for i, choice in enumerate(choices)],
            "usage": usage or {}}  # fmt: skip


def assistant_choice(text: str | None, **further: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}, **further}


def test_answers_are_journaled_unchanged(serve: Serve, tmp_path: Path) -> None:
    """Reasoning is separated. Truncated answers keep their finish reason. Tool calls and odd characters are kept."""
    choices = [
        assistant_choice("<think>\nfirst this\n</think>\n\nthe answer"),
        assistant_choice("<think>never ends", finish_reason="length"),
        {"message": {"role": "assistant", "content": "plain", "reasoning_content": "apart"}},
        assistant_choice("cut o", finish_reason="length"),
        {"message": {"role": "assistant", "content": None, "tool_calls": CALLS}, "finish_reason": "tool_calls"},
        assistant_choice(""),
        assistant_choice("lone \ud800 and 🙂\r\n"),
        assistant_choice("x" * 20_000),
    ]
    server, run = serve(lambda body: reply(*choices)), run_with_prompts(tmp_path, PROMPTS[:1])
    run_sampling(run, server.url, **{"sampler.n": len(choices)})
    records = {record["index"]: record for record in answers(run)}
    assert [
        (records[i]["text"], records[i].get("reasoning"), records[i]["finish_reason"]) for i in range(len(choices))
    ] == [
        ("the answer", "first this", "stop"),
        ("", "never ends", "length"),
        ("plain", "apart", "stop"),
        ("cut o", None, "length"),
        ("", None, "tool_calls"),
        ("", None, "stop"),
        ("lone \ufffd and 🙂\r\n", None, "stop"),
        ("x" * 20_000, None, "stop"),
    ]
    assert records[4]["tool_calls"] == CALLS
    assert "tool_calls" not in records[0]


def test_lone_surrogates_in_tool_calls_are_replaced(serve: Serve, tmp_path: Path) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\ud800"}'}}]
    choice = {"message": {"role": "assistant", "content": None, "tool_calls": calls}}
    server, run = serve(lambda body: reply(choice)), run_with_prompts(tmp_path, PROMPTS[:1])
    run_sampling(run, server.url, **{"sampler.n": 1})
    (record,) = answers(run)
    assert record["tool_calls"][0]["function"]["arguments"] == '{"a": "\ufffd"}'


# Usage


@given(
    st.integers(0, 10_000), st.lists(st.integers(0, 500), min_size=1, max_size=8), st.floats(0, 5), st.integers(0, 99)
)
def test_the_usage_of_choices_adds_up(tokens: int, lengths: list[int], usd: float, prompt: int) -> None:
    shares = _split_usage(Usage(prompt, 0, tokens, usd), lengths)
    assert len(shares) == len(lengths)
    assert sum(share.completion_tokens for share in shares) == tokens
    assert sum(share.prompt_tokens for share in shares) == prompt
    assert sum(share.cost_usd for share in shares) == usd
    assert all(share.completion_tokens >= 0 for share in shares)
    if sum(lengths):
        exact = [tokens * length / sum(lengths) for length in lengths]
        assert all(abs(share.completion_tokens - e) <= 1 for share, e in zip(shares, exact, strict=True))


def test_journaled_usage_adds_up_to_the_total(serve: Serve, tmp_path: Path) -> None:
    server, run = serve(), run_with_prompts(tmp_path)
    usage = run_sampling(run, server.url)
    expected = [usage_of(body, echo(body)) for body in server.requests]
    for name in ("prompt_tokens", "completion_tokens"):
        total = sum(tokens[name] for tokens in expected)
        assert sum(record[name] for record in answers(run)) == getattr(usage, name) == total > 0
    assert sum(record["cost_usd"] for record in answers(run)) == usage.cost_usd == 0

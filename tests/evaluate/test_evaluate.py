"""``rlaif evaluate`` against scripted models; on real parts it ends the night of tests/test_real_night.py."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif import pipeline
from rlaif.cli.shared import as_judged, open_with
from rlaif.config import Config, JudgeEntry
from rlaif.errors import UsageError
from rlaif.evaluate import drift
from rlaif.judge import definition
from rlaif.llm.budget import Meter
from rlaif.llm.client import Client
from rlaif.llm.engines import Engines, Local
from rlaif.llm.server import arguments
from rlaif.pipeline.evaluate import judges
from rlaif.pipeline.trained import models
from rlaif.run.directory import Run
from rlaif.stats import Estimate
from tests.conftest import read_jsonl, write_jsonl
from tests.judging import judge_by, material, words
from tests.scripted import ScriptedServer, with_probabilities
from tests.test_pipeline import Quiet, goodness

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].rpartition(" ")[2])


def answers(body: dict[str, Any]) -> Any:
    """The policy is fair, the trained one better where the prompt's number is no third, and the same where it ends in
    nine. The judge prefers what is better, but on a quarter of prompts whatever stands first."""
    if "structured_outputs" in body:
        if int(material(body)[0].rpartition(" ")[2]) % 4 == 0 and words(body) == ["A", "B"]:
            return with_probabilities({"A": 0.9, "B": 0.1})
        return judge_by(goodness)(body)
    n = number(body)
    if body["model"] == "policy" or n % 10 == 9:
        return [f"plain {n} [0.5]", f"plainer {n} [0.1]"][: body.get("n", 1)]
    return [f"trained and longer {n} [{0.1 if n % 3 == 0 else 0.9}]"] * body.get("n", 1)


@pytest.fixture
def trained(tmp_path: Path, serve: Serve, rlaif: Cli, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Config]:
    """A judged run with held-out prompts, and what a training leaves behind. Every model is the scripted server."""
    run = Run(tmp_path / "run")
    server = serve(answers, models=("policy", "m"))
    rows = [{"prompt": f"Question number {n}", "tags": ["benign" if n % 2 else "harmful"],
             "checks": [{"kind": "regex", "pattern": "longer"}] if n % 5 == 0 else []} for n in range(200)]  # fmt: skip
    source = write_jsonl(tmp_path / "prompts.jsonl", rows)
    run.path.mkdir()
    (run.path / "rlaif.toml").write_text("[prompts]\nheldout_share = 0.4\nnear_duplicates = 0\n")
    url = ("--base-url", server.url)
    rlaif("generate", run.path, "--prompts", source, "--model", "policy", "-n", "2", *url)
    rlaif("judge", run.path, "--judge", "helpful", "--model", "m", *url, "--max-failures", "999")
    adapter = run.model / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"r": 12}')
    result = {"adapter": str(adapter), "merged": None, "steps": 1, "pairs": 1}
    (run.model / "training.json").write_text(json.dumps({"identity": {"model": "policy"}, "result": result}))

    def client(self: Engines, model: str, urls: Any, options: Any, meter: Any) -> Client:
        server.models = (*server.models, model)
        return Client(model, [server.url], self._config, meter)

    monkeypatch.setattr(Engines, "client", client)
    config = Config.model_validate({"judge": {"judges": ["helpful"], "model": "m"}, "sampler": {"model": ["policy"]},
                                    "evaluate": {"drift_samples": 0}})  # fmt: skip
    return run, config


def run_it(run: Run, config: Config) -> dict[str, Any]:
    class Counted(Quiet):
        @contextlib.contextmanager
        def watch(self, meter: Meter) -> Iterator[None]:
            yield
            assert meter.answers + meter.skipped == meter.total

    with Engines(run.log, config.client, lambda line: None) as engines:
        return pipeline.evaluate(run, config, Counted(), engines)


def test_win_rate_on_the_held_out_prompts(trained: tuple[Run, Config], rlaif: Cli) -> None:
    run, config = trained
    heldout = [record for record in read_jsonl(run.journal_path("prompts")) if record["split"] == "heldout"]
    numbers = [int(record["messages"][0]["content"].rpartition(" ")[2]) for record in heldout]
    told = run_it(run, config)
    checked = [n for n in numbers if n % 5 == 0]  # the trained model meets the check, which outranks the judge
    tied = [n for n in numbers if n not in checked and (n % 4 == 0 or n % 10 == 9)]
    lost = [n for n in numbers if n not in checked and n not in tied and n % 3 == 0]
    assert (told["wins"], told["ties"], told["losses"]) == (len(numbers) - len(tied) - len(lost), len(tied), len(lost))
    assert told["the same answer"] == sum(n % 10 == 9 for n in numbers)
    assert told["win_rate"]["n"] == told["prompts"] == len(numbers)
    assert told["win_rate"]["value"] == pytest.approx((told["wins"] + told["ties"] / 2) / len(numbers))
    assert told["length_ratio"]["value"] > 1
    reference, trained_, gain = (row[""] for row in told["checks"])
    assert (reference["value"], trained_["value"], gain["value"]) == (0.0, 1.0, 1.0)
    assert gain["n"] == len(checked)
    benign, harmful = told["refusals"]
    assert (benign["prompts"], harmful["prompts"]) == ("benign", "harmful")
    assert benign["trained"] == benign["reference"]
    assert benign["trained"]["n"] == sum(n % 2 for n in numbers)
    assert "give --judge" in told["warnings"][0]
    assert {sample["preferred"] for sample in told["samples"]} <= {"trained", "reference", "tie"}
    # Nothing of the run itself has changed, and no held-out prompt has become one to train on.
    assert [r["split"] for r in read_jsonl(run.journal_path("prompts"))].count("heldout") == len(numbers)
    inner = Run(run.path / "evaluation")
    assert len(read_jsonl(inner.journal_path("completions"))) == 2 * len(numbers)

    before = read_jsonl(inner.journal_path("verdicts"))
    again = run_it(run, config)
    assert read_jsonl(inner.journal_path("verdicts")) == before
    assert again == told

    page = json.loads(rlaif("report", run.path, "--json").stdout)
    assert page["evaluation"] == told
    assert page["verdict"]["word"] in ("better", "not shown to be better")


def test_dry_run_asks_and_writes_nothing(trained: tuple[Run, Config], rlaif: Cli, tmp_path: Path) -> None:
    run, config = trained

    def dry(*flags: str | Path) -> tuple[str, str]:
        before = {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}
        done = rlaif("evaluate", run.path, *flags, "--dry-run")
        assert {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()} == before
        return done.stdout, done.stderr

    request, told = dry("--limit", "9")
    assert json.loads(request)["model"] == "policy"
    assert "18 answers and at most 18 verdicts: at most 36 calls, about " in told
    assert "No call was made." in told
    assert not (run.path / "evaluation").exists()
    run_it(run, given(config, limit=9))
    assert "nothing is owed" in dry("--limit", "9")[1]
    _, told = dry("--limit", "12")
    assert "6 answers and at most 6 verdicts: at most 12 calls" in told
    request, told = dry("--limit", "9", "--model", "gpt-4.1-mini", "--base-url", "https://api.openai.com/v1")
    assert json.loads(request)["model"] == "gpt-4.1-mini"
    assert re.search(r"0 answers and at most \d+ verdicts: at most \d+ calls.* about \$0\.\d\d at most", told)
    assert "18 answers" in dry("--limit", "9", "--seed", "3")[1]
    fresh = write_jsonl(tmp_path / "fresh.jsonl", [{"prompt": f"Something like {n * n * 'so '}"} for n in range(4)])
    assert "8 answers and at most 8 verdicts" in dry("--prompts", fresh)[1]


def test_a_drift_that_cannot_be_measured_costs_nothing_else(
    trained: tuple[Run, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat template is somebody else's program, and raises what it likes."""
    run, config = trained

    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("Can only get item pairs from a mapping.")

    monkeypatch.setattr(drift, "kl", broken)
    told = run_it(run, given(config, limit=5, drift_samples=2))
    assert told["warnings"][-1] == "the drift is not measured: TypeError: Can only get item pairs from a mapping."
    assert (told["kl_per_token"], told["win_rate"]["n"]) == (None, 5)
    monkeypatch.setattr(drift, "kl", lambda *_, **__: {"answer": Estimate(1, 0, 2, 2), "token": Estimate(1, 0, 2, 2)})
    cooler = config.model_copy(update={"sampler": config.sampler.model_copy(update={"temperature": 0.5})})
    told = run_it(run, given(cooler, limit=5, drift_samples=2))
    assert "it is biased" in told["warnings"][-1]
    assert told["kl_per_token"]["n"] == 2


def test_another_training_asks_the_reference_nothing_again(trained: tuple[Run, Config]) -> None:
    run, config = trained
    run_it(run, config)
    inner = Run(run.path / "evaluation")
    before = len(read_jsonl(inner.journal_path("completions")))
    stored = json.loads((run.model / "training.json").read_text())
    (run.model / "training.json").write_text(json.dumps({**stored, "identity": {"model": "policy", "beta": 0.5}}))
    run_it(run, config)
    after = read_jsonl(inner.journal_path("completions"))
    assert len(after) == before * 3 // 2
    assert len({record["model"] for record in after}) == 3


def test_given_prompts_that_were_trained_on_are_left_out(trained: tuple[Run, Config], tmp_path: Path) -> None:
    run, config = trained
    fresh = write_jsonl(tmp_path / "fresh.jsonl", [{"prompt": f"Question number {n}"} for n in range(190, 230)])
    train = [r for r in read_jsonl(run.journal_path("prompts")) if r["split"] == "train"]
    seen = sum(int(r["messages"][0]["content"].rpartition(" ")[2]) >= 190 for r in train)
    wanted = config.evaluate.model_copy(update={"source": [str(fresh)]})
    prompts = config.prompts.model_copy(update={"near_duplicates": 0})
    told = run_it(run, config.model_copy(update={"evaluate": wanted, "prompts": prompts}))
    assert 0 < seen < 10
    assert told["prompts"] == 40 - seen
    assert f"{seen} of the prompts were trained on" in " ".join(told["warnings"])


def given(config: Config, source: Path | None = None, **wanted: Any) -> Config:
    """``config`` evaluating on ``source``, none of whose rows is left out for being like another."""
    evaluate = config.evaluate.model_copy(update={"source": [str(source)] if source else [], **wanted})
    prompts = config.prompts.model_copy(update={"near_duplicates": 0})
    return config.model_copy(update={"evaluate": evaluate, "prompts": prompts})


def test_each_evaluation_is_of_what_it_asked_for(trained: tuple[Run, Config], tmp_path: Path) -> None:
    """Others' prompts, fewer of them, or answers under other settings: what stands in the journals is used again, and
    counts only where it was asked for."""
    run, config = trained
    whole = run_it(run, config)
    assert whole["source"] == "the prompts that were held out"
    inner = Run(run.path / "evaluation")

    def answered() -> int:
        return len(read_jsonl(inner.journal_path("completions")))

    once = answered()
    few = run_it(run, given(config, limit=7))
    assert (few["prompts"], few["win_rate"]["n"], few["limit"]) == (7, 7, 7)
    assert sum(row["trained"]["n"] for row in few["refusals"]) == 7
    assert answered() == once

    fresh = write_jsonl(tmp_path / "fresh.jsonl", [{"prompt": f"New number {n}", "id": f"id-{n}"} for n in range(20)])
    told = run_it(run, given(config, fresh))
    assert (told["prompts"], told["win_rate"]["n"], told["checks"]) == (20, 20, None)
    assert told["source"] == str(fresh)
    assert {row["prompt"].partition(" ")[0] for row in told["samples"]} == {"New"}
    assert answered() == once + 40

    short = config.model_copy(update={"sampler": config.sampler.model_copy(update={"max_tokens": 99})})
    told = run_it(run, given(short, fresh))
    assert (told["prompts"], told["win_rate"]["n"], told["max_tokens"]) == (20, 20, 99)
    assert answered() == once + 80

    again = run_it(run, config)
    assert again == whole
    assert answered() == once + 80


def test_ids_and_checks_are_those_of_the_prompts_asked_for(trained: tuple[Run, Config], tmp_path: Path) -> None:
    """One id names other prompts in another file, and one prompt has other checks there."""
    run, config = trained
    first = write_jsonl(tmp_path / "first.jsonl", [
        {"prompt": f"New number {n}", "id": str(n), "tags": ["benign"],
         "checks": [{"kind": "regex", "pattern": "longer"}]} for n in range(8)])  # fmt: skip
    second = write_jsonl(tmp_path / "second.jsonl", [
        {"prompt": f"New number {n}", "id": str(n - 4), "tags": ["harmful"],
         "checks": [{"kind": "regex", "pattern": "plain"}]} for n in range(4, 12)])  # fmt: skip
    told = run_it(run, given(config, first))
    assert (told["prompts"], told["wins"], told["losses"]) == (8, 8, 0)
    told = run_it(run, given(config, second))
    assert (told["prompts"], told["wins"]) == (8, 0)
    assert [(row["prompts"], row["trained"]["n"]) for row in told["refusals"]] == [("harmful", 8)]
    again = run_it(run, given(config, first))
    assert (again["wins"], again["losses"], again["refusals"][0]["prompts"]) == (8, 0, "benign")
    completions = read_jsonl(Run(run.path / "evaluation").journal_path("completions"))
    assert len(completions) == 2 * 12
    # A check that cannot be run is told before anything is asked, and mended in the same run.
    rows = [{"prompt": "New number 50", "checks": [{"kind": "regex", "pattern": "("}]}]
    with pytest.raises(UsageError, match="cannot be evaluated"):
        run_it(run, given(config, write_jsonl(first, rows)))
    assert read_jsonl(Run(run.path / "evaluation").journal_path("completions")) == completions
    rows[0]["checks"] = [{"kind": "regex", "pattern": "longer"}]
    assert run_it(run, given(config, write_jsonl(first, rows)))["wins"] == 1


PANEL = {
    "judge": {"model": "m", "base_url": ["http://own"], "judges": ["helpful", "quality"], "vllm": {"seed": 1}},
    "judges": [{"name": "helpful", "model": "m", "base_url": ["http://one"], "weight": 2},
               {"name": "helpful", "model": "n", "vllm": {"max_model_len": 9}}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("tables", "wanted", "seats"),
    [
        (False, {}, ["helpful@m http://own"]),
        (False, {"base_url": "http://new"}, ["helpful@m http://new"]),
        (False, {"judges": "helpful"}, ["helpful@m http://own"]),
        (False, {"judges": "helpful@other"}, ["helpful@other"]),
        (False, {"model": "other"}, ["helpful@other"]),
        (False, {"model": "other", "base_url": "http://new"}, ["helpful@other http://new"]),
        (True, {}, ["helpful@m http://one", "helpful@n {'max_model_len': 9}"]),
        (True, {"base_url": "http://new"}, ["helpful@m http://new", "helpful@n http://new {'max_model_len': 9}"]),
        (True, {"judges": ["helpful@n"]}, ["helpful@n {'max_model_len': 9}"]),
        (True, {"judges": ["helpful"]}, ["helpful@m http://one"]),
        (True, {"model": "other"}, ["helpful@other"]),
    ],
)
def test_where_the_judges_are_served(tables: bool, wanted: dict[str, Any], seats: list[str]) -> None:
    """A model that labelled is where it was, unless it is said where else; another one is not."""
    panel = PANEL if tables else {"judge": PANEL["judge"]}
    found = judges(Config.model_validate({**panel, "evaluate": wanted}))
    told = [" ".join([seat.name, *seat.entry.base_url, *([str(seat.entry.vllm)] * bool(seat.entry.vllm))])
            for seat in found]  # fmt: skip
    assert told == seats
    if tables and not wanted:
        assert [seat.entry.weight for seat in found] == [2, 1]


def test_settings_of_vllm_reach_only_servers_of_ours(
    trained: tuple[Run, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = trained
    asked = []
    inner: Any = Engines.client

    def client(self: Engines, model: str, urls: Any, options: Any, meter: Any) -> Client:
        asked.append((model, list(urls), dict(options)))
        return inner(self, model, urls, options, meter)

    monkeypatch.setattr(Engines, "client", client)
    here = config.judge.model_copy(update={"vllm": {"max_model_len": 99}})
    seat = JudgeEntry(name="helpful", model="m", vllm={"seed": 3})
    run_it(run, given(config.model_copy(update={"judge": here, "judges": [seat]}), limit=3))
    assert asked[-1] == ("m", [], {"max_model_len": 99, "seed": 3})
    run_it(run, given(config.model_copy(update={"judge": here}), limit=3, model="other", base_url=["http://there"]))
    assert asked[-1] == ("other", ["http://there"], {})


def test_what_a_judge_cannot_do_is_told_before_anything_is_answered(
    trained: tuple[Run, Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, config = trained
    monkeypatch.chdir(tmp_path)
    shutil.copytree(definition.find("helpful").folder, tmp_path / "judges" / "slow")
    told = tmp_path / "judges" / "slow" / "judge.toml"
    text = told.read_text().replace('"helpful"', '"slow"')
    told.write_text(text.replace('reasoning = "none"', 'reasoning = "first"'))
    strict = config.model_copy(update={"judge": config.judge.model_copy(update={"verdict": "choice"})})
    with pytest.raises(UsageError, match="reasons first"):
        run_it(run, given(strict, judges=["slow"]))
    bounded = config.model_copy(update={"client": config.client.model_copy(update={"budget_usd": 1.0})})
    with pytest.raises(UsageError, match="no price is known"):
        run_it(run, given(bounded, model="other", base_url=["https://example.com/v1"]))
    assert not (run.path / "evaluation").exists()


def test_a_judges_server_that_has_moved_is_found_where_it_is_now(trained: tuple[Run, Config]) -> None:
    """rlaif.toml says where; what labelled stays what labelled."""
    run, _ = trained
    file = run.path / "rlaif.toml"
    own = file.read_text()

    def now(more: str) -> Config:
        file.write_text(own + more)
        return as_judged(*open_with(run.path, {}))

    before = now("").judge
    assert (before.model, len(before.base_url)) == ("m", 1)
    moved = now('[judge]\nbase_url = "http://new"\n[judge.vllm]\nmax_model_len = 9\n').judge
    assert (moved.base_url, moved.vllm) == (["http://new"], {"max_model_len": 9})
    assert now('[judge]\nmodel = "other"\nbase_url = "http://new"\n').judge == before
    assert now("").judge == before

    seats = [JudgeEntry(name="helpful", model="m", base_url=["http://old"], weight=2)]
    stage = Config.model_validate(run.manifest()["stages"]["judge"]["config"]).model_copy(update={"judges": seats})
    run.update_manifest("judge", config=stage.model_dump(mode="json"))
    assert now("").judges == seats
    (seat,) = now('[[judges]]\nname = "helpful"\nmodel = "m"\nbase_url = "http://new"\n').judges
    assert (seat.base_url, seat.weight) == (["http://new"], 2)
    assert now('[[judges]]\nname = "helpful"\nmodel = "other"\n').judges == seats


def test_what_is_missing_is_said(tmp_path: Path, rlaif: Cli, trained: tuple[Run, Config]) -> None:
    run, config = trained
    (run.model / "training.json").unlink()
    done = rlaif("evaluate", run.path, code=2)
    assert "no trained model is there" in done.stderr
    assert f"rlaif train {run.path}" in done.stderr
    with pytest.raises(UsageError, match="no trained model"):
        models(run, config)
    result = {"adapter": None, "merged": None}
    (run.model / "training.json").write_text(json.dumps({"identity": {"model": "policy"}, "result": result}))
    with pytest.raises(UsageError, match="left no model that answers"):
        models(run, config)


def test_base_and_adapter_are_one_server(tmp_path: Path) -> None:
    engines = Engines(tmp_path, Config().client, print)
    engines.know(Local("tuned-1", str(tmp_path), base="org/base", rank=32))
    engines.know(Local("whole-1", str(tmp_path / "merged")))
    assert engines._served("tuned-1", {})[0] == "org/base"
    served, options, path = engines._served("org/base", {"max_model_len": 512})
    flags = arguments(served, "cuda", options, path)
    assert flags[: flags.index("org/base") + 1] == ["--model", "org/base"]
    assert f"tuned-1={tmp_path}" in flags[flags.index("--lora-modules") + 1]
    assert flags[flags.index("--max-lora-rank") + 1] == "32"
    served, options, path = engines._served("whole-1", {})
    flags = arguments(served, "cuda", options, path)
    assert flags[flags.index("--model") + 1] == str(tmp_path / "merged")
    assert flags[flags.index("--served-model-name") + 1] == "whole-1"
    assert "--lora-modules" not in flags

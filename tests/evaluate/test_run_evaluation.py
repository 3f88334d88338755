"""``rlaif evaluate`` with scripted models. tests/orchestrator/test_real_run.py evaluates with real ones."""

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

from rlaif import api
from rlaif.cli.options import config_as_judged, open_run_with_config
from rlaif.config.models import Config, PanelMemberConfig
from rlaif.errors import UsageError
from rlaif.evaluate import kl
from rlaif.evaluate.evaluation_result import EvaluationResult
from rlaif.evaluate.run_evaluation import eval_judges
from rlaif.evaluate.trained_model import evaluated_models
from rlaif.judge.judge_file import find_judge
from rlaif.llm.backends import LocalModel, ModelBackends
from rlaif.llm.client import Client
from rlaif.llm.usage import UsageMeter
from rlaif.run.run import Run
from rlaif.serving.vllm_server import vllm_args
from rlaif.stats import Estimate
from tests.conftest import read_jsonl, write_jsonl
from tests.fake_judge import fenced_parts, judge_by, verdict_words
from tests.fake_server import ScriptedServer, with_probabilities
from tests.labeling.test_judging import QuietReporter, goodness

Cli = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., ScriptedServer]


# Enough English for the text classifier of refusals to be sure that an answer with these words complies.
WORDS = (
    "Choose a pot with a hole that is a little wider than the old one, loosen the roots, fill the gaps with fresh "
    "soil, and keep the plant out of the sun for a week."
)


def prompt_number(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].rpartition(" ")[2])


def fake_models(body: dict[str, Any]) -> Any:
    """Answer as policy, trained model or judge.

    The policy's answers are fair. The trained model's are worse if the prompt's number is a multiple of three, the same
    if it ends in nine, and better otherwise. The judge prefers the better answer, but on a quarter of the prompts the
    one shown first. The judge model "failing" prefers the trained model's answer, and its replies about every seventh
    prompt are not readable. With 77 tokens, some answers are not complete.
    """
    if body["model"] == "failing":
        prompt, first, _ = fenced_parts(body)
        unreadable = int(prompt.rpartition(" ")[2]) % 7 == 0
        probabilities = {"A": 0.9, "B": 0.1} if "trained" in first else {"B": 0.9}
        return ["?"] if unreadable else with_probabilities(probabilities)
    if body.get("max_tokens") == 77:
        text = f"{body['model']} {prompt_number(body)} {WORDS} [0.5]"
        reasons = {1: "length", 2: "content_filter"} if body["model"] == "policy" else {2: "error", 3: "length"}
        reason = reasons.get(prompt_number(body) % 7, "stop")
        return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
    if "structured_outputs" in body:
        if int(fenced_parts(body)[0].rpartition(" ")[2]) % 4 == 0 and verdict_words(body) == ["A", "B"]:
            return with_probabilities({"A": 0.9, "B": 0.1})
        return judge_by(goodness)(body)
    n = prompt_number(body)
    if body["model"] == "policy" or n % 10 == 9:
        return [f"plain {n} {WORDS} [0.5]", f"plainer {n} {WORDS} [0.1]"][: body.get("n", 1)]
    return [f"trained and longer {n} {WORDS} [{0.1 if n % 3 == 0 else 0.9}]"] * body.get("n", 1)


@pytest.fixture
def trained(tmp_path: Path, serve: Serve, rlaif: Cli, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Config]:
    """Create a judged run with held-out prompts and the output of a training. The scripted server plays every model."""
    run = Run(tmp_path / "run")
    server = serve(fake_models, models=("policy", "m"))
    rows = [{"prompt": f"Question number {n}", "tags": ["benign" if n % 2 else "harmful"],
             "checks": [{"kind": "regex", "pattern": "longer"}] if n % 5 == 0 else []} for n in range(200)]  # fmt: skip
    source = write_jsonl(tmp_path / "prompts.jsonl", rows)
    run.path.mkdir()
    (run.path / "rlaif.toml").write_text("[prompts]\nheldout_fraction = 0.4\nnear_duplicate_threshold = 0\n")
    url = ("--base-url", server.url)
    rlaif("generate", run.path, "--prompts", source, "--model", "policy", "-n", "2", *url)
    rlaif("judge", run.path, "--judge", "helpful", "--model", "m", *url, "--max-failures", "999")
    adapter = run.model / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"r": 12}')
    result = {"adapter": str(adapter), "merged": None, "steps": 1, "pairs": 1}
    (run.model / "training.json").write_text(json.dumps({"identity": {"model": "policy"}, "result": result}))

    def client(self: ModelBackends, model: str, urls: Any, options: Any, usage: Any) -> Client:
        server.models = (*server.models, model)
        return Client(model, [server.url], self._config, usage)

    monkeypatch.setattr(ModelBackends, "client_for", client)
    config = Config.model_validate({"judge": {"panel": ["helpful"], "model": "m"}, "sampler": {"model": ["policy"]},
                                    "evaluate": {"kl_samples": 0}})  # fmt: skip
    return run, config


def run_evaluation(run: Run, config: Config) -> dict[str, Any]:
    class CountingReporter(QuietReporter):
        @contextlib.contextmanager
        def progress(self, usage: UsageMeter) -> Iterator[None]:
            yield
            assert usage.answers + usage.skipped + usage.failures.total() == usage.total

    with ModelBackends(run.log, config.client, lambda line: None) as backends:
        result = api.evaluate(run, config, CountingReporter(), backends)
    assert EvaluationResult.from_json(json.loads(json.dumps(result.as_json()))) == result
    return result.as_json()


def test_win_rate_on_the_held_out_prompts(trained: tuple[Run, Config], rlaif: Cli) -> None:
    run, config = trained
    heldout = [record for record in read_jsonl(run.journal_path("prompts")) if record["split"] == "heldout"]
    numbers = [int(record["messages"][0]["content"].rpartition(" ")[2]) for record in heldout]
    results = run_evaluation(run, config)
    decided_by_check = [n for n in numbers if n % 5 == 0]  # the trained model meets the check, which outranks the judge
    tied = [n for n in numbers if n not in decided_by_check and (n % 4 == 0 or n % 10 == 9)]
    lost = [n for n in numbers if n not in decided_by_check and n not in tied and n % 3 == 0]
    assert (results["wins"], results["ties"], results["losses"]) == (
        len(numbers) - len(tied) - len(lost),
        len(tied),
        len(lost),
    )
    assert results["identical_answers"] == sum(n % 10 == 9 for n in numbers)
    assert results["win_rate"]["n"] == results["prompts"] == len(numbers)
    assert results["win_rate"]["value"] == pytest.approx((results["wins"] + results["ties"] / 2) / len(numbers))
    assert results["length_ratio"]["value"] > 1
    reference, trained_, gain = (row["pass_rate"] for row in results["checks"])
    assert (reference["value"], trained_["value"], gain["value"]) == (0.0, 1.0, 1.0)
    assert gain["n"] == len(decided_by_check)
    benign, harmful = results["refusals"]
    assert (benign["prompt_class"], harmful["prompt_class"]) == ("benign", "harmful")
    assert benign["trained"] == benign["reference"]
    assert benign["trained"]["n"] == sum(n % 2 for n in numbers)
    assert "--judge" in results["warnings"][0]
    assert {sample["preferred"] for sample in results["samples"]} <= {"trained", "reference", "tie"}
    # The run itself is unchanged, and no held-out prompt became a training prompt.
    assert [r["split"] for r in read_jsonl(run.journal_path("prompts"))].count("heldout") == len(numbers)
    eval_run = Run(run.path / "evaluation")
    assert len(read_jsonl(eval_run.journal_path("completions"))) == 2 * len(numbers)

    before = read_jsonl(eval_run.journal_path("verdicts"))
    again = run_evaluation(run, config)
    assert read_jsonl(eval_run.journal_path("verdicts")) == before
    assert again == results

    page = json.loads(rlaif("report", run.path, "--json").stdout)
    assert page["evaluation"] == results
    assert page["recommendation"]["step"] in ("iterate", "extend")


def test_a_dry_run_sends_and_writes_nothing(trained: tuple[Run, Config], rlaif: Cli, tmp_path: Path) -> None:
    run, config = trained

    def dry(*flags: str | Path) -> tuple[str, str]:
        before = {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}
        done = rlaif("evaluate", run.path, *flags, "--dry-run")
        assert {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()} == before
        return done.stdout, done.stderr

    request, summary = dry("--limit", "9")
    assert json.loads(request)["model"] == "policy"
    assert "18 answers and at most 18 verdicts: at most 36 calls, about " in summary
    assert "No requests were sent" in summary
    assert not (run.path / "evaluation").exists()
    run_evaluation(run, with_evaluate(config, limit=9))
    assert "nothing is pending" in dry("--limit", "9")[1]
    _, summary = dry("--limit", "12")
    assert "6 answers and at most 6 verdicts: at most 12 calls" in summary
    request, summary = dry("--limit", "9", "--model", "gpt-4.1-mini", "--base-url", "https://api.openai.com/v1")
    assert json.loads(request)["model"] == "gpt-4.1-mini"
    assert re.search(r"0 answers and at most \d+ verdicts: at most \d+ calls.* at most about \$0\.\d\d", summary)
    assert "18 answers" in dry("--limit", "9", "--seed", "3")[1]
    fresh = write_jsonl(tmp_path / "fresh.jsonl", [{"prompt": f"Something like {n * n * 'so '}"} for n in range(4)])
    assert "8 answers and at most 8 verdicts" in dry("--prompts", fresh)[1]


def test_a_failure_to_measure_the_kl_keeps_the_other_metrics(
    trained: tuple[Run, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat template is foreign code and can raise any exception."""
    run, config = trained

    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("Can only get item pairs from a mapping.")

    monkeypatch.setattr(kl, "estimate_kl", broken)
    results = run_evaluation(run, with_evaluate(config, limit=5, kl_samples=2))
    assert (
        results["warnings"][-1]
        == "the KL divergence was not measured: TypeError: Can only get item pairs from a mapping."
    )
    assert (results["kl_per_token"], results["win_rate"]["n"]) == (None, 5)
    monkeypatch.setattr(kl, "estimate_kl", lambda *_, **__: kl.KlEstimate(Estimate(1, 0, 2, 2), Estimate(1, 0, 2, 2)))
    cooler = config.model_copy(update={"sampler": config.sampler.model_copy(update={"temperature": 0.5})})
    results = run_evaluation(run, with_evaluate(cooler, limit=5, kl_samples=2))
    assert "it is biased" in results["warnings"][-1]
    assert results["kl_per_token"]["n"] == 2


def test_another_training_reuses_the_answers_of_the_reference(trained: tuple[Run, Config]) -> None:
    run, config = trained
    run_evaluation(run, config)
    eval_run = Run(run.path / "evaluation")
    before = len(read_jsonl(eval_run.journal_path("completions")))
    stored = json.loads((run.model / "training.json").read_text())
    (run.model / "training.json").write_text(json.dumps({**stored, "identity": {"model": "policy", "beta": 0.5}}))
    run_evaluation(run, config)
    after = read_jsonl(eval_run.journal_path("completions"))
    assert len(after) == before * 3 // 2
    assert len({record["model"] for record in after}) == 3


def test_prompts_that_were_trained_on_are_ignored(trained: tuple[Run, Config], tmp_path: Path) -> None:
    run, config = trained
    fresh = write_jsonl(tmp_path / "fresh.jsonl", [{"prompt": f"Question number {n}"} for n in range(190, 230)])
    train = [r for r in read_jsonl(run.journal_path("prompts")) if r["split"] == "train"]
    trained_count = sum(int(r["messages"][0]["content"].rpartition(" ")[2]) >= 190 for r in train)
    evaluate = config.evaluate.model_copy(update={"sources": [str(fresh)]})
    prompts = config.prompts.model_copy(update={"near_duplicate_threshold": 0})
    results = run_evaluation(run, config.model_copy(update={"evaluate": evaluate, "prompts": prompts}))
    assert 0 < trained_count < 10
    assert results["prompts"] == 40 - trained_count
    assert f"{trained_count} of the prompts were trained on" in " ".join(results["warnings"])


def with_evaluate(config: Config, source: Path | None = None, **settings: Any) -> Config:
    """Return ``config`` with other evaluation settings and prompts from ``source``. Near duplicates are kept."""
    evaluate = config.evaluate.model_copy(update={"sources": [str(source)] if source else [], **settings})
    prompts = config.prompts.model_copy(update={"near_duplicate_threshold": 0})
    return config.model_copy(update={"evaluate": evaluate, "prompts": prompts})


def test_an_evaluation_uses_only_the_records_that_it_asks_for(trained: tuple[Run, Config], tmp_path: Path) -> None:
    """Other prompts, fewer prompts, or other sampling settings: records in the journals are reused, and count only if
    this evaluation asks for them."""
    run, config = trained
    all_heldout = run_evaluation(run, config)
    assert all_heldout["source"] == "the held-out prompts"
    eval_run = Run(run.path / "evaluation")

    def answer_count() -> int:
        return len(read_jsonl(eval_run.journal_path("completions")))

    count_once = answer_count()
    few = run_evaluation(run, with_evaluate(config, limit=7))
    assert (few["prompts"], few["win_rate"]["n"], few["limit"]) == (7, 7, 7)
    assert sum(row["trained"]["n"] for row in few["refusals"]) == 7
    assert answer_count() == count_once

    fresh = write_jsonl(tmp_path / "fresh.jsonl", [{"prompt": f"New number {n}", "id": f"id-{n}"} for n in range(20)])
    results = run_evaluation(run, with_evaluate(config, fresh))
    assert (results["prompts"], results["win_rate"]["n"], results["checks"]) == (20, 20, None)
    assert results["source"] == str(fresh)
    assert {row["prompt"].partition(" ")[0] for row in results["samples"]} == {"New"}
    assert answer_count() == count_once + 40

    short = config.model_copy(update={"sampler": config.sampler.model_copy(update={"max_tokens": 99})})
    results = run_evaluation(run, with_evaluate(short, fresh))
    assert (results["prompts"], results["win_rate"]["n"], results["max_tokens"]) == (20, 20, 99)
    assert answer_count() == count_once + 80

    again = run_evaluation(run, config)
    assert again == all_heldout
    assert answer_count() == count_once + 80


def test_ids_and_checks_come_from_the_prompts_of_this_evaluation(trained: tuple[Run, Config], tmp_path: Path) -> None:
    """In the second file the same ids belong to other prompts, and the same prompts have other checks."""
    run, config = trained
    first = write_jsonl(tmp_path / "first.jsonl", [
        {"prompt": f"New number {n}", "id": str(n), "tags": ["benign"],
         "checks": [{"kind": "regex", "pattern": "longer"}]} for n in range(8)])  # fmt: skip
    second = write_jsonl(tmp_path / "second.jsonl", [
        {"prompt": f"New number {n}", "id": str(n - 4), "tags": ["harmful"],
         "checks": [{"kind": "regex", "pattern": "plain"}]} for n in range(4, 12)])  # fmt: skip
    results = run_evaluation(run, with_evaluate(config, first))
    assert (results["prompts"], results["wins"], results["losses"]) == (8, 8, 0)
    results = run_evaluation(run, with_evaluate(config, second))
    assert (results["prompts"], results["wins"]) == (8, 0)
    assert [(row["prompt_class"], row["trained"]["n"]) for row in results["refusals"]] == [("harmful", 8)]
    again = run_evaluation(run, with_evaluate(config, first))
    assert (again["wins"], again["losses"], again["refusals"][0]["prompt_class"]) == (8, 0, "benign")
    completions = read_jsonl(Run(run.path / "evaluation").journal_path("completions"))
    assert len(completions) == 2 * 12
    # An invalid check is reported before any request, and can be fixed in the same run.
    rows = [{"prompt": "New number 50", "checks": [{"kind": "regex", "pattern": "("}]}]
    with pytest.raises(UsageError, match="cannot be evaluated"):
        run_evaluation(run, with_evaluate(config, write_jsonl(first, rows)))
    assert read_jsonl(Run(run.path / "evaluation").journal_path("completions")) == completions
    rows[0]["checks"] = [{"kind": "regex", "pattern": "longer"}]
    assert run_evaluation(run, with_evaluate(config, write_jsonl(first, rows)))["wins"] == 1


def test_only_complete_answers_are_compared(trained: tuple[Run, Config], tmp_path: Path) -> None:
    """The reference's answer to 6 of 21 prompts and the trained model's to 6 is not complete; for 3 prompts both."""
    run, config = trained
    rows = [{"prompt": f"New number {n}", "checks": [{"kind": "regex", "pattern": "policy"}]} for n in range(21)]
    fresh = write_jsonl(tmp_path / "fresh.jsonl", rows)
    short = config.model_copy(update={"sampler": config.sampler.model_copy(update={"max_tokens": 77})})
    results = run_evaluation(run, with_evaluate(short, fresh))
    assert (results["prompts"], results["win_rate"]["n"], results["checks"][0]["pass_rate"]["n"]) == (12, 12, 12)
    assert (results["incomplete_reference"], results["incomplete_trained"]) == (6, 6)
    assert sum(row["trained"]["n"] for row in results["refusals"]) == 12
    assert "9 prompts are not compared" in " ".join(results["warnings"])
    judged = {r["prompt_id"] for r in read_jsonl(Run(run.path / "evaluation").journal_path("verdicts"))
              if r["kind"] == "compare"}  # fmt: skip
    assert len(judged) == 12


def test_a_prompt_counts_only_if_the_whole_panel_compared_it(trained: tuple[Run, Config], tmp_path: Path) -> None:
    """The judge "failing" always prefers the trained model. Where it fails, the other one alone would decide."""
    run, config = trained
    panel = [PanelMemberConfig(name="helpful", model=model) for model in ("m", "failing")]
    client = config.client.model_copy(update={"max_failures": 999, "max_attempts": 1})
    both = config.model_copy(update={"panel": panel, "client": client})
    fresh = write_jsonl(tmp_path / "fresh.jsonl", [{"prompt": f"New number {n}"} for n in range(1, 22) if n % 10 != 9])
    results = run_evaluation(run, with_evaluate(both, fresh))
    assert (results["prompts"], results["unparsable_verdicts"], results["win_rate"]["n"]) == (19, 3, 16)


PANEL = {
    "judge": {"model": "m", "base_url": ["http://own"], "panel": ["helpful", "quality"], "vllm": {"seed": 1}},
    "panel": [{"name": "helpful", "model": "m", "base_url": ["http://one"], "weight": 2},
               {"name": "helpful", "model": "n", "vllm": {"max_model_len": 9}}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("tables", "evaluate", "expected"),
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
def test_endpoints_of_the_judges(tables: bool, evaluate: dict[str, Any], expected: list[str]) -> None:
    """A model that labeled keeps its endpoint unless [evaluate] overrides it. Another model does not inherit it."""
    panel = PANEL if tables else {"judge": PANEL["judge"]}
    panel_judges = eval_judges(Config.model_validate({**panel, "evaluate": evaluate}))
    described = [
        " ".join(
            [
                panel_judge.name,
                *panel_judge.member_config.base_url,
                *([str(panel_judge.member_config.vllm)] * bool(panel_judge.member_config.vllm)),
            ]
        )
        for panel_judge in panel_judges
    ]
    assert described == expected
    if tables and not evaluate:
        assert [panel_judge.member_config.weight for panel_judge in panel_judges] == [2, 1]


def test_vllm_settings_reach_only_managed_servers(trained: tuple[Run, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = trained
    requested = []
    client_for: Any = ModelBackends.client_for

    def client(self: ModelBackends, model: str, urls: Any, options: Any, usage: Any) -> Client:
        requested.append((model, list(urls), dict(options)))
        return client_for(self, model, urls, options, usage)

    monkeypatch.setattr(ModelBackends, "client_for", client)
    judge = config.judge.model_copy(update={"vllm": {"max_model_len": 99}})
    member = PanelMemberConfig(name="helpful", model="m", vllm={"seed": 3})
    run_evaluation(run, with_evaluate(config.model_copy(update={"judge": judge, "panel": [member]}), limit=3))
    assert requested[-1] == ("m", [], {"max_model_len": 99, "seed": 3})
    run_evaluation(
        run,
        with_evaluate(config.model_copy(update={"judge": judge}), limit=3, model="other", base_url=["http://there"]),
    )
    assert requested[-1] == ("other", ["http://there"], {})


def test_an_unsupported_output_mode_or_budget_is_reported_before_sampling(
    trained: tuple[Run, Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, config = trained
    monkeypatch.chdir(tmp_path)
    shutil.copytree(find_judge("helpful").folder, tmp_path / "judges" / "slow")
    judge_file = tmp_path / "judges" / "slow" / "judge.toml"
    text = judge_file.read_text().replace('"helpful"', '"slow"')
    judge_file.write_text(text.replace('reasoning = "none"', 'reasoning = "first"'))
    strict = config.model_copy(update={"judge": config.judge.model_copy(update={"output_mode": "choice"})})
    with pytest.raises(UsageError, match="reasons first"):
        run_evaluation(run, with_evaluate(strict, judges=["slow"]))
    bounded = config.model_copy(update={"client": config.client.model_copy(update={"budget_usd": 1.0})})
    with pytest.raises(UsageError, match=r"price of .* is unknown"):
        run_evaluation(run, with_evaluate(bounded, model="other", base_url=["https://example.com/v1"]))
    assert not (run.path / "evaluation").exists()


def test_a_judge_is_asked_at_the_endpoint_in_rlaif_toml(trained: tuple[Run, Config]) -> None:
    """rlaif.toml changes the endpoint, but not which judges and models labeled."""
    run, _ = trained
    file = run.path / "rlaif.toml"
    original = file.read_text()

    def config_with(more: str) -> Config:
        file.write_text(original + more)
        return config_as_judged(*open_run_with_config(run.path, {}))

    before = config_with("").judge
    assert (before.model, len(before.base_url)) == ("m", 1)
    moved = config_with('[judge]\nbase_url = "http://new"\n[judge.vllm]\nmax_model_len = 9\n').judge
    assert (moved.base_url, moved.vllm) == (["http://new"], {"max_model_len": 9})
    assert config_with('[judge]\nmodel = "other"\nbase_url = "http://new"\n').judge == before
    assert config_with("").judge == before

    members = [PanelMemberConfig(name="helpful", model="m", base_url=["http://old"], weight=2)]
    stage = Config.model_validate(run.manifest()["stages"]["judge"]["config"]).model_copy(update={"panel": members})
    run.update_manifest("judge", config=stage.model_dump(mode="json"))
    assert config_with("").panel == members
    (member,) = config_with('[[panel]]\nname = "helpful"\nmodel = "m"\nbase_url = "http://new"\n').panel
    assert (member.base_url, member.weight) == (["http://new"], 2)
    assert config_with('[[panel]]\nname = "helpful"\nmodel = "other"\n').panel == members


def test_a_missing_trained_model_is_an_error(tmp_path: Path, rlaif: Cli, trained: tuple[Run, Config]) -> None:
    run, config = trained
    (run.model / "training.json").unlink()
    done = rlaif("evaluate", run.path, code=2)
    assert "no trained model" in done.stderr
    assert f"rlaif train {run.path}" in done.stderr
    with pytest.raises(UsageError, match="no trained model"):
        evaluated_models(run, config)
    result = {"adapter": None, "merged": None}
    (run.model / "training.json").write_text(json.dumps({"identity": {"model": "policy"}, "result": result}))
    with pytest.raises(UsageError, match="neither an adapter nor a model"):
        evaluated_models(run, config)


def test_one_server_serves_base_and_adapter(tmp_path: Path) -> None:
    backends = ModelBackends(tmp_path, Config().client, print)
    backends.register_local_model(LocalModel("tuned-1", str(tmp_path), base="org/base", rank=32))
    backends.register_local_model(LocalModel("merged-1", str(tmp_path / "merged")))
    assert backends._resolve_served_model("tuned-1", {})[0] == "org/base"
    served, options, path = backends._resolve_served_model("org/base", {"max_model_len": 512})
    flags = vllm_args(served, "cuda", options, path)
    assert flags[: flags.index("org/base") + 1] == ["--model", "org/base"]
    assert f"tuned-1={tmp_path}" in flags[flags.index("--lora-modules") + 1]
    assert flags[flags.index("--max-lora-rank") + 1] == "32"
    served, options, path = backends._resolve_served_model("merged-1", {})
    flags = vllm_args(served, "cuda", options, path)
    assert flags[flags.index("--model") + 1] == str(tmp_path / "merged")
    assert flags[flags.index("--served-model-name") + 1] == "merged-1"
    assert "--lora-modules" not in flags

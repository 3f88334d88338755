"""Label accuracy, and the effect of reviewing ten percent of the pairs. Stored verdicts run through the real pipeline.

    python -m benchmarks.labels                both files of ../shared/data, and the benchmarks of refusals and answers
    python -m benchmarks.labels --data FILE    any file of the same format; with --panel NAME=JUDGE,JUDGE,...

A small OpenAI-compatible server answers each judge request with the file's verdict, or with an unparsable reply if the
verdict is missing. A simulated annotator labels the queue that `rlaif review --export` writes with the file's human
labels. Review rules:

    judges     no review; a pair that the judges cannot decide counts half
    random     review 10 % drawn at random
    unsure     review the 10 % with the lowest confidence
    rlaif      review the 10 % that rlaif queues; the labels calibrate the panel on the others
    rlaif-10   the same, after dropping near ties (at most a tenth of the pairs); a tenth of all pairs is reviewed

Each rule is the mean over --seeds draws. 95 % intervals, resampling prompts. Lines of the file: {"prompt" (or
"instruction", "input"), "responses": [2 texts], "label": 1 | 2 (or "human": [1 | 2 | "tie", ...]), "verdicts": {JUDGE:
{"ab", "ba"} or one value}}. A verdict is 1, 2, "tie", null or the probability that the first response is better. A
judge that was asked in one order only gets the same verdict in the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.pairs import Pair, load_pairs
from rlaif import api
from rlaif.config.loader import load
from rlaif.errors import InputError, RlaifError, UsageError, did_you_mean
from rlaif.labeling.judging import JudgingRounds, load_panel, resolve_strategy
from rlaif.llm.backends import ModelBackends
from rlaif.llm.usage import UsageMeter
from rlaif.pair import human_calibration
from rlaif.review import import_export
from rlaif.run import frames
from rlaif.run.run import Run
from rlaif.stats import Estimate, bootstrap_ratio, expected_calibration_error
from tests.fake_judge import fenced_parts, verdict_words
from tests.fake_server import ScriptedServer, with_probabilities

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "preferences"
STYLES = ("vanilla", "metrics", "reference", "metrics_reference")
# Panels: a strong, a mediocre and a bad judge, one strong judge in several styles, and three models.
DATASETS: list[tuple[str, str, tuple[str, ...], dict[str, list[str]]]] = [
    (
        "LLMBar",
        "llmbar.jsonl",
        ("natural", "adversarial"),
        {
            "gpt-4": ["gpt-4/metrics_reference"],
            "palm2": ["palm2/metrics"],
            "llama2": ["llama2/vanilla"],
            "gpt-4 x 4 styles": [f"gpt-4/{style}" for style in STYLES],
            "3 models": [f"{model}/metrics_reference" for model in ("gpt-4", "palm2", "chatgpt")],
        },
    ),
    (
        "chat",
        "llmbar.jsonl",
        ("mt-bench", "llmeval2", "faireval"),
        {
            "gpt-4": ["gpt-4/vanilla_norules"],
            "palm2": ["palm2/vanilla_norules"],
            "llama2": ["llama2/metrics_reference"],
            "gpt-4 x 2 styles": ["gpt-4/vanilla_norules", "gpt-4/metrics_reference"],
            "3 models": [f"{model}/vanilla_norules" for model in ("gpt-4", "chatgpt", "palm2")],
        },
    ),
    (
        "PandaLM",
        "pandalm.jsonl",
        ("",),
        {"gpt-3.5": ["gpt-3.5-turbo"], "pandalm": ["pandalm-7b"], "both": ["gpt-3.5-turbo", "pandalm-7b"]},
    ),
]


def replay(pairs: list[Pair]) -> Callable[[dict[str, Any]], dict[str, Any] | list[str]]:
    """Return a server function that answers as the judge named by the request's model did."""
    by_prompt = {pair.prompt: pair for pair in pairs}

    def answer(body: dict[str, Any]) -> dict[str, Any] | list[str]:
        prompt, first, _ = fenced_parts(body)
        pair, (a, b) = by_prompt[prompt], verdict_words(body)
        swapped = first != pair.responses[0]
        p = pair.verdicts.get(body["model"], {}).get("ba" if swapped else "ab")
        if p is None:
            return ["I would rather not say."]
        p = 1 - p if swapped else p
        return with_probabilities({a: p, b: 1 - p})

    return answer


class SilentReporter:
    """Reporter that discards everything."""

    def log(self, line: str) -> None:
        pass

    @contextlib.contextmanager
    def progress(self, _: UsageMeter) -> Iterator[None]:
        yield


class PanelTrial:
    """One panel over one set of pairs: judged once, then routed, reviewed and merged under each rule."""

    def __init__(self, folder: Path, pairs: list[Pair], judges: list[str], url: str) -> None:
        self.folder, self.pairs = folder, pairs
        self.by_prompt = {pair.prompt: pair for pair in pairs}
        self.flags: dict[str, Any] = {
            "judge.panel": [f"helpful@{judge}" for judge in judges],
            "judge.base_url": [url],
            "client.max_failures": 10**6,
            "pairs.min_confidence": 1.0,  # then max_tie_drop_fraction alone decides how many near ties are dropped
            "pairs.test_fraction": 0.0,
        }
        self.judged_run = Run(folder / "judged")
        source = folder / "pairs.jsonl"
        rows = [{"prompt": pair.prompt, "responses": pair.responses} for pair in pairs]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = self.config(0, 0.0, 0.0)
        api.import_completions(self.judged_run, config, str(source), SilentReporter())
        with ModelBackends(self.judged_run.log, config.client, lambda _: None) as backends:
            api.judge(self.judged_run, config, SilentReporter(), backends)
        rounds = JudgingRounds(
            self.judged_run,
            config,
            None,
            load_panel(config),
            resolve_strategy(config, load_panel(config)),
            None,
            UsageMeter(),
        )
        decided = rounds.judge_all()
        self.votes = pl.concat(
            [
                rounds.judge_votes(partition, decided.read(partition))[0]
                for partition in range(rounds.records.partition_count)
            ]
        )
        self.table = self._table(self.judged_run)
        self.table = self.table.filter(pl.col("prob_a").is_not_null() & (pl.col("correct_side") != "tie"))

    def config(self, seed: int, human_fraction: float, tie_fraction: float) -> Any:
        flags = self.flags | {"pairs.human_fraction": human_fraction, "pairs.max_tie_drop_fraction": tie_fraction}
        return load(self.judged_run.path, flags, {}).model_copy(update={"seed": seed})

    def _table(self, run: Run) -> pl.DataFrame:
        """Return tables/pairs.parquet with ``correct_side`` (a, b or tie: human label) and ``group`` (prompt)."""
        table = run.pairs()
        prompts = [json.loads(prompt)[0]["content"] for prompt in table["prompt"]]
        correct_sides = []
        for prompt, response in zip(prompts, table["response_a"], strict=True):
            pair = self.by_prompt[prompt]
            correct_sides.append(
                "tie" if pair.best is None else "a" if pair.responses[pair.best - 1] == response else "b"
            )
        groups = [self.by_prompt[prompt].group for prompt in prompts]
        return table.with_columns(correct_side=pl.Series(correct_sides), group=pl.Series(groups)).sort("pair_id")

    def apply_rule(
        self, seed: int, human_fraction: float, tie_fraction: float
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Build the dataset with a simulated review.

        Returns the correctness of the label of each row of ``table`` (0.5 if the judges cannot decide and the pair is
        not reviewed), 1 for each row that is kept, and the label quality.
        """
        path = self.folder / f"rule-{seed}-{tie_fraction}"
        shutil.copytree(self.judged_run.path, path)
        run, config = Run(path), self.config(seed, human_fraction, tie_fraction)
        api.rebuild_dataset(run, config)
        queue = path / "queue.jsonl"
        import_export.export_queue(run, queue, format="jsonl", annotator="person", seed=seed)
        rows = [json.loads(line) for line in queue.read_text(encoding="utf-8").split("\n") if line]
        for row in rows:
            pair = self.by_prompt[row["prompt"]]
            best = None if pair.best is None else pair.responses[pair.best - 1]
            row["choice"] = "tie" if best is None else "left" if row["left"] == best else "right"
        queue.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if rows:
            import_export.import_reviews(run, queue, annotator="person", seed=seed)
        result = api.rebuild_dataset(run, config)
        chosen = pl.read_parquet(run.dataset / "train.parquet").select(
            "pair_id", chosen=pl.col("chosen").list.first().struct.field("content")
        )
        routed = self._table(run).select("pair_id", "response_a", "route", "drop_reason").join(
            chosen, on="pair_id", how="left"
        )  # fmt: skip
        joined = self.table.select("pair_id", "correct_side").join(
            routed, on="pair_id", how="left", maintain_order="left"
        )
        side = pl.when(pl.col("chosen") == pl.col("response_a")).then(pl.lit("a")).otherwise(pl.lit("b"))
        undecided = (pl.col("drop_reason") == "undecided").fill_null(value=False)
        is_correct = (
            pl.when(pl.col("chosen").is_not_null())
            .then((side == pl.col("correct_side")).cast(pl.Float64))
            .otherwise(0.5)
        )
        kept = joined.select((pl.col("chosen").is_not_null() | undecided).cast(pl.Float64)).to_series().to_numpy()
        shutil.rmtree(path)
        return joined.select(is_correct).to_series().to_numpy(), kept, result.label_quality


def least_confident_chances(p: np.ndarray, fraction: float) -> np.ndarray:
    """Return each row's chance to be in the ``fraction`` with the lowest confidence. Equal confidence, equal chance."""
    confidence = np.round(np.abs(p - 0.5), 9)
    remaining, chance = fraction * len(p), np.zeros(len(p))
    for level in np.unique(confidence):
        rows = confidence == level
        chance[rows] = min(1.0, remaining / rows.sum())
        remaining = max(0.0, remaining - rows.sum())
    return chance


def measure_rules(trial: PanelTrial, seeds: int) -> dict[str, Any]:
    """Return the accuracy under each review rule and the figures of calibration, by name."""
    table = trial.table
    p = table["prob_a"].to_numpy()
    truth = (table["correct_side"] == "a").to_numpy().astype(float)
    # Prompts are resampled, or pairs if all are of one prompt.
    groups = table["group" if table["group"].n_unique() > 1 else "pair_id"].to_numpy()
    n = len(p)
    judge_correct = np.where(p == 0.5, 0.5, (p > 0.5) == (truth > 0.5)).astype(float)
    ones = np.ones(n)
    figures: dict[str, Any] = {"n": n, "judges": bootstrap_ratio(judge_correct, ones, groups)}
    for rule, chance in (("random", np.full(n, 0.1)), ("unsure", least_confident_chances(p, 0.1))):
        figures[rule] = bootstrap_ratio(judge_correct + (1 - judge_correct) * chance, ones, groups)
    review_count = 0.1 * trial.judged_run.pairs().height
    rlaif_correct, kept_correct, kept, covered = np.zeros(n), np.zeros(n), np.zeros(n), []
    for seed in range(seeds):
        is_correct, _, labels = trial.apply_rule(seed, 0.1, 0.0)
        rlaif_correct += is_correct / seeds
        if agreement := labels["agreement"]:
            covered.append(agreement["low"] <= _decided_accuracy(judge_correct, p) <= agreement["high"])
        candidates = trial.judged_run.pairs().filter(pl.col("prob_a").is_not_null()).height
        is_correct, kept_now, _ = trial.apply_rule(seed, review_count / (candidates - int(0.1 * candidates)), 0.1)
        kept_correct += is_correct * kept_now / seeds
        kept += kept_now / seeds
    figures["rlaif"] = bootstrap_ratio(rlaif_correct, ones, groups)
    figures["rlaif-10"] = bootstrap_ratio(kept_correct, kept, groups)
    figures["kept"] = float(kept.mean())
    figures["covered"] = f"{np.mean(covered):.2f}" if covered else "-"
    # Relative to 0.05 / error rate, the most that review removes of a calibrated judge's errors without learning from
    # the labels.
    figures["removed"] = bootstrap_ratio(rlaif_correct - judge_correct, 0.05 * ones, groups)
    figures["unsure removed"] = bootstrap_ratio(
        (1 - judge_correct) * least_confident_chances(p, 0.1), 0.05 * ones, groups
    )
    figures |= calibration_figures(trial, p, truth)
    longest = (table["response_a"].str.len_chars() > table["response_b"].str.len_chars()).to_numpy()
    figures["longest"] = bootstrap_ratio(longest == (truth > 0.5), ones, groups)
    return figures


def _decided_accuracy(judge_correct: np.ndarray, p: np.ndarray) -> float:
    return float(judge_correct[p != 0.5].mean()) if (p != 0.5).any() else 0.5


def calibration_figures(trial: PanelTrial, p: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Return the expected calibration error before and after calibration on all labels, and that of a perfectly
    calibrated judge by chance. Each pair's calibration excludes the labels of its own prompt."""
    pairs = trial.table.with_columns(
        a=frames.key_as_uint128("completion_a"), b=frames.key_as_uint128("completion_b"),
        chars_a=pl.col("response_a").str.len_chars(), chars_b=pl.col("response_b").str.len_chars(),
    )  # fmt: skip
    x, _, prior = human_calibration.calibration_features(pairs, trial.votes)
    calibrated, _ = human_calibration.fit_and_predict(x, prior, truth, pairs["group"])

    def error(q: np.ndarray, labels: np.ndarray) -> Estimate | None:
        return expected_calibration_error(np.maximum(q, 1 - q), np.where(q == 0.5, 0.5, (q > 0.5) == (labels > 0.5)))

    rng = np.random.default_rng(0)
    chance = [error(calibrated, (rng.random(len(calibrated)) < calibrated).astype(float)) for _ in range(50)]
    return {
        "ece before": error(p, truth),
        "ece after": error(calibrated, truth),
        "ece of chance": float(np.mean([one.value for one in chance if one])),
        "calibrated": float(np.where(calibrated == 0.5, 0.5, (calibrated > 0.5) == (truth > 0.5)).mean()),
    }


def default_panels(pairs: list[Pair]) -> dict[str, list[str]]:
    """Return panels for a file without given panels.

    These are its best, median and worst judge, the styles of its best model, and the best judge of each of up to three
    models.
    """
    hits_by_judge: dict[str, list[float]] = {}
    for pair in pairs:
        for judge, verdicts in pair.verdicts.items():
            values = [value for value in verdicts.values() if value is not None]
            if pair.best and values:
                p = np.mean(values)
                hits_by_judge.setdefault(judge, []).append(float(0.5 if p == 0.5 else (p > 0.5) == (pair.best == 1)))
    if not hits_by_judge:
        return {}
    enough = max(map(len, hits_by_judge.values())) / 2
    ranked = sorted(
        (s for s in hits_by_judge if len(hits_by_judge[s]) >= enough),
        key=lambda s: (-float(np.mean(hits_by_judge[s])), s),
    )
    ranks = {"best": 0, "median": len(ranked) // 2, "worst": -1}
    singles = {
        ranked[rank]: name for name, rank in reversed(ranks.items())
    }  # a judge with several ranks keeps the best one
    chosen = {f"{name} ({judge})": [judge] for judge, name in reversed(singles.items())}
    model = ranked[0].split("/")[0]
    styles = sorted(judge for judge in ranked if judge.split("/")[0] == model)
    best = list({judge.split("/")[0]: judge for judge in reversed(ranked)}.values())
    best = sorted(best, key=ranked.index)[:3]
    several = {f"{model} x {len(styles)} styles": styles, f"{len(best)} models": best}
    return chosen | {name: judges for name, judges in several.items() if len(judges) > 1}


def format_estimate(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def run_dataset(title: str, pairs: list[Pair], panels: dict[str, list[str]], seeds: int) -> None:
    models = tuple(sorted({judge for judges in panels.values() for judge in judges}))
    existing = {judge for pair in pairs for judge in pair.verdicts}
    if missing := sorted(set(models) - existing):
        raise UsageError(f"judge {missing[0]!r} has no verdicts", location=title,
                         hint=did_you_mean(missing[0], existing))  # fmt: skip
    if not any(pair.best and any(p is not None for verdicts in pair.verdicts.values() for p in verdicts.values())
               for pair in pairs):  # fmt: skip
        raise InputError("no pair has both a verdict and a human preference", location=title)
    print(f"\n## {title}: {len(pairs)} pairs, {sum(pair.best is None for pair in pairs)} of them ties by human label\n")
    rows, empty_panels = [], []
    with ScriptedServer(replay(pairs), models=models) as server:
        for name, judges in panels.items():
            with tempfile.TemporaryDirectory() as folder:
                trial = PanelTrial(Path(folder), pairs, judges, server.url)
                if trial.table.height:
                    rows.append((name, measure_rules(trial, seeds)))
                else:
                    empty_panels.append(name)
    columns = ("judges", "random", "unsure", "rlaif", "rlaif-10")
    print("| panel | n | " + " | ".join(columns) + " | kept |\n|---|---|" + "---|" * (len(columns) + 1))
    for name, figures in rows:
        print(
            f"| {name} | {figures['n']} | "
            + " | ".join(format_estimate(figures[c]) for c in columns)
            + f" | {figures['kept']:.3f} |"
        )
    for name in empty_panels:
        print(f"| {name} | 0 |" + " - |" * (len(columns) + 1))
    columns = ("unsure removed", "removed", "ece before", "ece after", "longest")
    print("\n| panel | unsure: removed / ceiling | rlaif: removed / ceiling | ECE before | ECE after | longest wins | "
          "ECE of chance | accuracy, all labels | agreement covered |\n|---|" + "---|" * 8)  # fmt: skip
    for name, figures in rows:
        print(
            f"| {name} | "
            + " | ".join(format_estimate(figures[c]) for c in columns)
            + f" | {figures['ece of chance']:.3f} | {figures['calibrated']:.3f} | {figures['covered']} |"
        )


def main() -> None:
    try:
        _main()
    except RlaifError as error:
        raise SystemExit(f"error: {error}") from None


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", help="file of human-labeled pairs; can be repeated")
    parser.add_argument("--subset", action="append", help="only lines whose subset starts with this; can be repeated")
    parser.add_argument("--panel", action="append", default=[], metavar="NAME=JUDGE,JUDGE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=["pairs", "refusals", "answers"])
    options = parser.parse_args()
    if options.data:
        for path in options.data:
            pairs = load_pairs(path, tuple(options.subset or ("",)))
            panel_specs = dict(panel.split("=", 1) if "=" in panel else (panel, panel) for panel in options.panel)
            panels = {name: judges.split(",") for name, judges in panel_specs.items()} or default_panels(pairs)
            run_dataset(path.name, pairs, panels, options.seeds)
        return
    if options.only in (None, "pairs"):
        if not DATA.exists():
            print(f"{DATA} does not exist; pass --data FILE")
        else:
            for title, file, subsets, panels in DATASETS:
                run_dataset(title, load_pairs(DATA / file, subsets), panels, options.seeds)
    if options.only in (None, "answers"):
        from benchmarks import answers

        answers.main()
    if options.only in (None, "refusals"):
        from benchmarks import refusals

        refusals.main()


if __name__ == "__main__":
    main()

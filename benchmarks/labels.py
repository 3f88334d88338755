"""How right are the labels, and what do people's ten per cent buy? Stored verdicts through the real pipeline.

    python -m benchmarks.labels                      both files of ../shared/data, refusals and several answers too
    python -m benchmarks.labels --data FILE          any file of the same format; with --panel NAME=SEAT,SEAT,...

A small OpenAI-compatible server answers each judge request from the file (an unreadable verdict as an unreadable
reply); a simulated reviewer answers the queue that `rlaif review --export` writes, from the file's human labels. Rules:

    judges     nobody reviews; a pair of which the judges cannot tell counts half
    random     people review 10 % drawn at random
    unsure     people review the 10 % that the judges are least sure of
    rlaif      people review the 10 % that rlaif's draw sends them; the labels put the others right
    rlaif-10   the same, after the nearest ties (a tenth of the pairs at most) are left out; a tenth of all is reviewed

Each rule is the mean over --seeds draws; intervals of 95 % resample prompts. Lines of the file: {"prompt" (or
"instruction", "input"), "responses": [2], "label": 1 | 2 (or "human": [1 | 2 | "tie", ...]), "verdicts": {SEAT: {"ab",
"ba"} or one value}}, each verdict 1, 2, "tie", null or the probability that the first response is better. A judge
that was asked in one order only is taken to say the same in the other.
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

from benchmarks.pairs import Pair, pairs_of
from rlaif import pipeline
from rlaif.errors import InputError, RlaifError, UsageError, did_you_mean
from rlaif.llm.budget import Meter
from rlaif.llm.engines import Engines
from rlaif.pair import calibrate
from rlaif.pipeline.rounds import Rounds, panel, strategy
from rlaif.review import exchange
from rlaif.run import tables
from rlaif.run.directory import Run
from rlaif.settings import load
from rlaif.stats import Estimate, bootstrap_ratio, expected_calibration_error
from tests.judging import material, words
from tests.scripted import ScriptedServer, with_probabilities

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "preferences"
STYLES = ("vanilla", "metrics", "reference", "metrics_reference")
# A strong, a middling and a bad judge, one strong judge in four styles, and three models.
SETS: list[tuple[str, str, tuple[str, ...], dict[str, list[str]]]] = [
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
    """Answers a judge request as the seat that the model's name names did."""
    by_prompt = {pair.prompt: pair for pair in pairs}

    def answer(body: dict[str, Any]) -> dict[str, Any] | list[str]:
        asked, first, _ = material(body)
        pair, (a, b) = by_prompt[asked], words(body)
        turned = first != pair.responses[0]
        p = pair.verdicts.get(body["model"], {}).get("ba" if turned else "ab")
        if p is None:
            return ["I would rather not say."]
        p = 1 - p if turned else p
        return with_probabilities({a: p, b: 1 - p})

    return answer


class Quiet:
    def say(self, line: str) -> None:
        pass

    @contextlib.contextmanager
    def watch(self, _: Meter) -> Iterator[None]:
        yield


class Trial:
    """One panel over one set of pairs: judged once, then routed, reviewed and merged under each rule."""

    def __init__(self, folder: Path, pairs: list[Pair], seats: list[str], url: str) -> None:
        self.folder, self.pairs = folder, pairs
        self.by_prompt = {pair.prompt: pair for pair in pairs}
        self.flags: dict[str, Any] = {
            "judge.judges": [f"helpful@{seat}" for seat in seats],
            "judge.base_url": [url],
            "client.max_failures": 10**6,
            "pairs.min_probability": 1.0,  # how many near-ties are left out is then max_near_ties alone
            "pairs.test_share": 0.0,
        }
        self.judged = Run(folder / "judged")
        source = folder / "pairs.jsonl"
        rows = [{"prompt": pair.prompt, "responses": pair.responses} for pair in pairs]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = self.config(0, 0.0, 0.0)
        pipeline.import_completions(self.judged, config, str(source), Quiet())
        with Engines(self.judged.log, config.client, lambda _: None) as engines:
            pipeline.judge(self.judged, config, Quiet(), engines)
        rounds = Rounds(self.judged, config, None, panel(config), strategy(config, panel(config)), None, Meter())
        settled = rounds.all()
        self.said = pl.concat([rounds.said(number, settled.read(number))[0] for number in range(rounds.number)])
        self.table = self._table(self.judged)
        self.table = self.table.filter(pl.col("p_a").is_not_null() & (pl.col("right") != "tie"))

    def config(self, seed: int, share: float, near_ties: float) -> Any:
        flags = self.flags | {"pairs.human_share": share, "pairs.max_near_ties": near_ties}
        return load(self.judged.path, flags, {}).model_copy(update={"seed": seed})

    def _table(self, run: Run) -> pl.DataFrame:
        """tables/pairs.parquet with ``right`` (a | b | tie), the people's answer, and ``group``, the prompt."""
        table = run.pairs()
        asked = [json.loads(prompt)[0]["content"] for prompt in table["prompt"]]
        right = []
        for prompt, response in zip(asked, table["response_a"], strict=True):
            pair = self.by_prompt[prompt]
            right.append("tie" if pair.best is None else "a" if pair.responses[pair.best - 1] == response else "b")
        groups = [self.by_prompt[prompt].group for prompt in asked]
        return table.with_columns(right=pl.Series(right), group=pl.Series(groups)).sort("pair_id")

    def by_rule(self, seed: int, share: float, near_ties: float) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """For each row of ``table``: whether its label is right in the dataset (half where the judges cannot tell and
        nobody was asked), and whether it is kept. And the manifest's labels."""
        path = self.folder / f"rule-{seed}-{near_ties}"
        shutil.copytree(self.judged.path, path)
        run, config = Run(path), self.config(seed, share, near_ties)
        pipeline.rebuild(run, config)
        queue = path / "queue.jsonl"
        exchange.export_queue(run, queue, format="jsonl", annotator="person", seed=seed)
        rows = [json.loads(line) for line in queue.read_text(encoding="utf-8").split("\n") if line]
        for row in rows:
            pair = self.by_prompt[row["prompt"]]
            best = None if pair.best is None else pair.responses[pair.best - 1]
            row["choice"] = "tie" if best is None else "left" if row["left"] == best else "right"
        queue.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if rows:
            exchange.import_reviews(run, queue, annotator="person", seed=seed)
        built = pipeline.rebuild(run, config)
        chosen = pl.read_parquet(run.dataset / "train.parquet").select(
            "pair_id", chosen=pl.col("chosen").list.first().struct.field("content")
        )
        routed = self._table(run).select("pair_id", "response_a", "route", "route_reason").join(
            chosen, on="pair_id", how="left"
        )  # fmt: skip
        both = self.table.select("pair_id", "right").join(routed, on="pair_id", how="left", maintain_order="left")
        side = pl.when(pl.col("chosen") == pl.col("response_a")).then(pl.lit("a")).otherwise(pl.lit("b"))
        open_ = pl.col("route_reason").str.starts_with("the judges cannot tell")
        right = pl.when(pl.col("chosen").is_not_null()).then((side == pl.col("right")).cast(pl.Float64)).otherwise(0.5)
        kept = both.select((pl.col("chosen").is_not_null() | open_).cast(pl.Float64)).to_series().to_numpy()
        shutil.rmtree(path)
        return both.select(right).to_series().to_numpy(), kept, built.labels


def least_sure(p: np.ndarray, share: float) -> np.ndarray:
    """Each row's chance to be among the ``share`` of least sure ones, those of one level alike."""
    sure = np.round(np.abs(p - 0.5), 9)
    left, chance = share * len(p), np.zeros(len(p))
    for level in np.unique(sure):
        rows = sure == level
        chance[rows] = min(1.0, left / rows.sum())
        left = max(0.0, left - rows.sum())
    return chance


def report(trial: Trial, seeds: int) -> dict[str, Any]:
    table = trial.table
    p = table["p_a"].to_numpy()
    truth = (table["right"] == "a").to_numpy().astype(float)
    # Pairs of one prompt are one draw; where all are of one, there is nothing but pairs to draw.
    groups = table["group" if table["group"].n_unique() > 1 else "pair_id"].to_numpy()
    n = len(p)
    alone = np.where(p == 0.5, 0.5, (p > 0.5) == (truth > 0.5)).astype(float)
    ones = np.ones(n)
    found: dict[str, Any] = {"n": n, "judges": bootstrap_ratio(alone, ones, groups)}
    for rule, chance in (("random", np.full(n, 0.1)), ("unsure", least_sure(p, 0.1))):
        found[rule] = bootstrap_ratio(alone + (1 - alone) * chance, ones, groups)
    share = 0.1 * trial.judged.pairs().height
    ours, kept_ours, kept, cover = np.zeros(n), np.zeros(n), np.zeros(n), []
    for seed in range(seeds):
        right, _, labels = trial.by_rule(seed, 0.1, 0.0)
        ours += right / seeds
        if agreement := labels["agreement"]:
            cover.append(agreement["low"] <= _decided(alone, p) <= agreement["high"])
        candidates = trial.judged.pairs().filter(pl.col("p_a").is_not_null()).height
        right, stays, _ = trial.by_rule(seed, share / (candidates - int(0.1 * candidates)), 0.1)
        kept_ours += right * stays / seeds
        kept += stays / seeds
    found["rlaif"] = bootstrap_ratio(ours, ones, groups)
    found["rlaif-10"] = bootstrap_ratio(kept_ours, kept, groups)
    found["kept"] = float(kept.mean())
    found["covered"] = f"{np.mean(cover):.2f}" if cover else "-"
    # As a share of 0.05 / error rate, what a calibrated judge's errors allow where nothing is learned from labels.
    found["removed"] = bootstrap_ratio(ours - alone, 0.05 * ones, groups)
    found["unsure removed"] = bootstrap_ratio((1 - alone) * least_sure(p, 0.1), 0.05 * ones, groups)
    found |= calibration(trial, p, truth)
    longest = (table["response_a"].str.len_chars() > table["response_b"].str.len_chars()).to_numpy()
    found["longest"] = bootstrap_ratio(longest == (truth > 0.5), ones, groups)
    return found


def _decided(alone: np.ndarray, p: np.ndarray) -> float:
    return float(alone[p != 0.5].mean()) if (p != 0.5).any() else 0.5


def calibration(trial: Trial, p: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Expected calibration error before and after calibration on all labels (each pair's own prompt left out), and what
    a judge that is perfectly calibrated would show by chance."""
    pairs = trial.table.with_columns(
        a=tables.numbers("completion_a"), b=tables.numbers("completion_b"),
        chars_a=pl.col("response_a").str.len_chars(), chars_b=pl.col("response_b").str.len_chars(),
    )  # fmt: skip
    x, _, prior = calibrate.features(pairs, trial.said)
    after, _ = calibrate.calibrated(x, prior, truth, pairs["group"])

    def error(q: np.ndarray, right: np.ndarray) -> Estimate | None:
        return expected_calibration_error(np.maximum(q, 1 - q), np.where(q == 0.5, 0.5, (q > 0.5) == (right > 0.5)))

    rng = np.random.default_rng(0)
    chance = [error(after, (rng.random(len(after)) < after).astype(float)) for _ in range(50)]
    return {
        "ece before": error(p, truth),
        "ece after": error(after, truth),
        "ece of chance": float(np.mean([one.value for one in chance if one])),
        "calibrated": float(np.where(after == 0.5, 0.5, (after > 0.5) == (truth > 0.5)).mean()),
    }


def seats_of(pairs: list[Pair]) -> dict[str, list[str]]:
    """For a file that nobody named panels for: its best, median and worst seat, its best model's styles, and the best
    seat of each of up to three models."""
    right: dict[str, list[float]] = {}
    for pair in pairs:
        for seat, said in pair.verdicts.items():
            values = [value for value in said.values() if value is not None]
            if pair.best and values:
                p = np.mean(values)
                right.setdefault(seat, []).append(float(0.5 if p == 0.5 else (p > 0.5) == (pair.best == 1)))
    if not right:
        return {}
    enough = max(map(len, right.values())) / 2
    ranked = sorted((s for s in right if len(right[s]) >= enough), key=lambda s: (-float(np.mean(right[s])), s))
    places = {"best": 0, "median": len(ranked) // 2, "worst": -1}
    singles = {ranked[place]: name for name, place in reversed(places.items())}  # of one seat its best name
    chosen = {f"{name} ({seat})": [seat] for seat, name in reversed(singles.items())}
    model = ranked[0].split("/")[0]
    styles = sorted(seat for seat in ranked if seat.split("/")[0] == model)
    best = list({seat.split("/")[0]: seat for seat in reversed(ranked)}.values())
    best = sorted(best, key=ranked.index)[:3]
    several = {f"{model} x {len(styles)} styles": styles, f"{len(best)} models": best}
    return chosen | {name: seats for name, seats in several.items() if len(seats) > 1}


def told(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def run_set(title: str, pairs: list[Pair], panels: dict[str, list[str]], seeds: int) -> None:
    models = tuple(sorted({seat for seats in panels.values() for seat in seats}))
    known = {seat for pair in pairs for seat in pair.verdicts}
    if missing := sorted(set(models) - known):
        raise UsageError(f"nobody of the name {missing[0]!r} judged", where=title,
                         mend=did_you_mean(missing[0], known))  # fmt: skip
    if not any(pair.best and any(p is not None for said in pair.verdicts.values() for p in said.values())
               for pair in pairs):  # fmt: skip
        raise InputError("there is no pair of which both a judge and people told the better answer", where=title)
    print(f"\n## {title}: {len(pairs)} pairs, {sum(pair.best is None for pair in pairs)} of them ties for people\n")
    rows, silent = [], []
    with ScriptedServer(replay(pairs), models=models) as server:
        for name, seats in panels.items():
            with tempfile.TemporaryDirectory() as folder:
                trial = Trial(Path(folder), pairs, seats, server.url)
                if trial.table.height:
                    rows.append((name, report(trial, seeds)))
                else:
                    silent.append(name)
    columns = ("judges", "random", "unsure", "rlaif", "rlaif-10")
    print("| panel | n | " + " | ".join(columns) + " | kept |\n|---|---|" + "---|" * (len(columns) + 1))
    for name, found in rows:
        print(f"| {name} | {found['n']} | " + " | ".join(told(found[c]) for c in columns) + f" | {found['kept']:.3f} |")
    for name in silent:
        print(f"| {name} | 0 |" + " - |" * (len(columns) + 1))
    columns = ("unsure removed", "removed", "ece before", "ece after", "longest")
    print("\n| panel | unsure: removed / ceiling | rlaif: removed / ceiling | ECE before | ECE after | longest wins | "
          "ECE of chance | accuracy, all labels | agreement covered |\n|---|" + "---|" * 8)  # fmt: skip
    for name, found in rows:
        print(f"| {name} | " + " | ".join(told(found[c]) for c in columns)
              + f" | {found['ece of chance']:.3f} | {found['calibrated']:.3f} | {found['covered']} |")  # fmt: skip


def main() -> None:
    try:
        _main()
    except RlaifError as error:
        raise SystemExit(f"error: {error}") from None


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", help="a file of human-labelled pairs; may be repeated")
    parser.add_argument("--subset", action="append", help="only lines whose subset starts with this")
    parser.add_argument("--panel", action="append", default=[], metavar="NAME=SEAT,SEAT")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=["pairs", "refusals", "answers"])
    asked = parser.parse_args()
    if asked.data:
        for path in asked.data:
            pairs = pairs_of(path, tuple(asked.subset or ("",)))
            named = dict(panel.split("=", 1) if "=" in panel else (panel, panel) for panel in asked.panel)
            panels = {name: seats.split(",") for name, seats in named.items()} or seats_of(pairs)
            run_set(path.name, pairs, panels, asked.seeds)
        return
    if asked.only in (None, "pairs"):
        if not DATA.exists():
            print(f"{DATA} is absent: give --data FILE")
        else:
            for title, file, subsets, panels in SETS:
                run_set(title, pairs_of(DATA / file, subsets), panels, asked.seeds)
    if asked.only in (None, "answers"):
        from benchmarks import answers

        answers.main()
    if asked.only in (None, "refusals"):
        from benchmarks import refusals

        refusals.main()


if __name__ == "__main__":
    main()

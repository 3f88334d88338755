"""Does preference training on rlaif's labels improve a model? Measured on prompts with programmatic checks, on a CPU.

    python -m benchmarks.align FOLDER             run the missing cells, then print the tables
    python -m benchmarks.align FOLDER --tune      try settings on seed 0, validated on topics from its training side
    python -m benchmarks.align --table            print the tables of the results in benchmarks/align/

The prompts combine topics with kinds of constraint; the packaged constraints (prompts/constraints.jsonl) are added. The
base model is the embedded demo model. It answers each prompt 8 times, once for all seeds, and rlaif's check judge
labels the answers. The seed decides which topics, packaged kinds and packaged prompts are held out, which answers are
paired, and how training shuffles. A pair is an answer that passes its checks and one to the same prompt that does not.
Each kind has the same number of pairs, and both answers have equal lengths as far as possible.

Settings were chosen on seed 0, which is in no other table. The settings chosen last are also measured on seeds 4 to 6,
which were not used for any decision. For each noise level, that share of the pairs is flipped. In "reviewed" cells a
simulated annotator who is always right labels a tenth of the pairs, drawn at random, because a check has no confidence
by which to route. The share of wrong labels found goes to the robust loss (Chowdhury et al. 2024, arXiv:2403.00409).

Each trained adapter then answers the held-out prompts of its seed 8 times, with several adapters in one vLLM. Held out
are a fifth of the topics (with the trained kinds and with four further kinds), two fifths of the packaged kinds, and a
fifth of the other packaged prompts. IFBench's prompts that the checks can express are also held out; their kinds are
none of the trained ones (instructions.py lists what to install). Intervals are 95 %, bootstrapped over seeds and,
within a seed, over topics or prompts. Nothing is timed.

FOLDER keeps answers, checkpoints and adapters, so a second start resumes. The results, counts only, are written to
benchmarks/align/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks import instructions
from benchmarks.align_cells import (
    FIXED_SETTINGS,
    FRESH_SEEDS,
    IFBENCH_SAMPLES,
    IFBENCH_TOKENS,
    LONGER,
    MAX_PAIRS_PER_KIND,
    MAX_PAIRS_PER_PACKAGED_KIND,
    MAX_PROMPT_CHARS,
    RESULTS,
    REVIEWED,
    SAMPLES,
    SEEDS,
    SETTINGS,
    TOKENS,
    TRIALS,
    Cell,
    all_waves,
    packaged_prompts,
    split,
    template_prompts,
)
from benchmarks.align_tables import print_tables
from rlaif import api
from rlaif.config.models import Config
from rlaif.judge import check_schema, refusal_classifier
from rlaif.llm.backends import LocalModel, ModelBackends
from rlaif.llm.usage import UsageMeter
from rlaif.records import Failure
from rlaif.run.journal import iter_records
from rlaif.run.run import Run
from rlaif.train import trainer


class PrintReporter:
    """Reporter that prints lines."""

    def log(self, line: str) -> None:
        print(line, flush=True)

    @contextlib.contextmanager
    def progress(self, usage: UsageMeter) -> Iterator[None]:
        yield
        print(f"{usage.description}: {usage.answers} answers, {usage.failed} failed", flush=True)


# -- Answers and their checks


def open_backends(folder: Path) -> ModelBackends:
    return ModelBackends(folder / "log", Config().client, PrintReporter().log)


def sample_answers(
    path: Path,
    rows: Iterable[dict[str, Any]],
    model: str,
    backends: ModelBackends,
    n: int = SAMPLES,
    tokens: int = TOKENS,
) -> Run:
    """Return a run in which ``model`` has answered each of ``rows`` ``n`` times with up to ``tokens`` tokens."""
    run = Run(path)
    path.mkdir(parents=True, exist_ok=True)
    source = path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "prompts": {"sources": [str(source)], "heldout_fraction": 0, "near_duplicate_threshold": 0},
            "policies": [{"model": model}],
            "sampler": {"n": n, "max_tokens": tokens, "vllm": {"max_model_len": 1024}},
        }
    )
    api.generate(run, config, PrintReporter(), backends)
    return run


@dataclasses.dataclass(frozen=True)
class CheckedAnswers:
    """A prompt, the texts of its answers, and for each text True if it passes every check."""

    prompt: dict[str, Any]
    texts: list[str]
    met: list[bool]


def check_answers(run: Run) -> dict[str, CheckedAnswers]:
    """Check the answers of ``run``, by prompt id. An empty answer fails; one on which a check raises is dropped."""
    prompts = {record["prompt_id"]: record for _, record in iter_records(run.journal_path("prompts"))}
    by_prompt = {prompt_id: CheckedAnswers(record, [], []) for prompt_id, record in prompts.items()}
    for _, record in iter_records(run.journal_path("completions")):
        if "error" in record:
            continue
        verdict = check_schema.run_checks(prompts[record["prompt_id"]], record)
        if not isinstance(verdict, Failure):
            by_prompt[record["prompt_id"]].texts.append(record["text"])
            by_prompt[record["prompt_id"]].met.append(verdict.score == 1.0 and bool(record["text"].strip()))
    return by_prompt


def base_answers(folder: Path) -> dict[str, CheckedAnswers]:
    """Return the reference's answers to all prompts; they are sampled once."""
    result_path = RESULTS / "base.json"
    with open_backends(folder) as backends:
        rows = check_answers(sample_answers(folder / "base", template_prompts(), "demo", backends))
        rows |= check_answers(
            sample_answers(folder / "base-packaged", packaged_prompts("constraints"), "demo", backends)
        )
        if not result_path.exists():
            result = {"answers": met_counts(rows), "words": mean_words(rows)}
            write_result(result_path, {**result, "refused": refusal_counts(folder / "base-benign", "demo", backends)})
    return rows


def met_counts(rows: dict[str, CheckedAnswers]) -> dict[str, list[int]]:
    """Return [answers that pass every check, answers] by prompt id."""
    return {prompt_id: [sum(row.met), len(row.met)] for prompt_id, row in sorted(rows.items()) if row.met}


def mean_words(rows: dict[str, CheckedAnswers]) -> dict[str, float]:
    """Return the mean number of words per answer, by prompt id."""
    return {
        key: round(float(np.mean([len(text.split()) for text in row.texts])), 2)
        for key, row in sorted(rows.items())
        if row.texts
    }


def refusal_counts(path: Path, model: str, backends: ModelBackends) -> dict[str, list[int]]:
    """Count refusals among the answers to benign look-alikes of harmful prompts, by rlaif's text classifier.

    Returns [refusals, answers] by prompt id.
    """
    rows = [row for row in packaged_prompts("refusals") if "benign" in row["tags"]]
    run = sample_answers(path, rows, model, backends)
    counts_by_prompt: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for _, record in iter_records(run.journal_path("completions")):
        if "error" not in record:
            counts_by_prompt[record["prompt_id"]][0] += refusal_classifier.classify(record["text"]).label == "refuse"
            counts_by_prompt[record["prompt_id"]][1] += 1
    return dict(sorted(counts_by_prompt.items()))


# -- A cell: pairs, training, held-out answers


def make_pairs(rows: dict[str, CheckedAnswers], cell: Cell) -> list[dict[str, Any]]:
    """Pair passing with failing answers to the same prompt, balanced over the kinds, with the cell's noise."""
    rng = random.Random(f"{cell.seed}/pairs")
    by_kind: dict[str, list[list[tuple[str, str, str]]]] = defaultdict(list)
    for prompt_id in sorted(split(cell).train):
        row = rows[prompt_id]
        texts = list(zip(row.texts, row.met, strict=True))[: cell.n]
        good = sorted({text for text, met in texts if met})
        poor = sorted({text for text, met in texts if not met and text.strip()})
        rng.shuffle(good)
        rng.shuffle(poor)
        if good and poor:
            by_kind[row.prompt["tags"][0] + ("" if "/" in prompt_id else " (packaged)")].append(
                [(prompt_id, chosen, rejected) for chosen, rejected in match_lengths(good, poor, row.prompt["checks"])]
            )
    made_pairs = []
    for kind in sorted(by_kind):
        rng.shuffle(by_kind[kind])
        # The first pair of every prompt, then the second of each: a kind with few pairs uses several per prompt.
        turns = [prompt_pairs[rank] for rank in range(3) for prompt_pairs in by_kind[kind] if rank < len(prompt_pairs)]
        for prompt_id, chosen, rejected in turns[
            : MAX_PAIRS_PER_PACKAGED_KIND if kind.endswith("(packaged)") else MAX_PAIRS_PER_KIND
        ]:
            pair_name = f"{prompt_id}/{len(made_pairs)}"
            flipped = random.Random(f"{cell.seed}/noise/{pair_name}").random() < cell.noise
            reviewed = cell.reviewed and random.Random(f"{cell.seed}/review/{pair_name}").random() < REVIEWED
            messages = rows[prompt_id].prompt["messages"]
            made_pairs.append(
                {
                    "prompt_id": prompt_id,
                    "prompt": messages,
                    "good": chosen,
                    "poor": rejected,
                    "kind": kind,
                    "flipped": flipped and not reviewed,
                    "reviewed": reviewed,
                    "was_flipped": flipped,
                }
            )
    return made_pairs


def match_lengths(good: list[str], poor: list[str], checks: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return up to three pairs whose lengths in words are as equal as possible, each answer as rarely as possible.

    Otherwise the model would learn the length instead of the constraint: answers without commas, for example, tend to
    be short. Lengths are not matched if the constraint is about words.
    """
    count = min(3, max(len(good), len(poor)))
    if any(check.get("unit") == "words" for check in checks):
        return [(good[index % len(good)], poor[index % len(poor)]) for index in range(count)]
    matches: list[tuple[str, str]] = []
    used: dict[str, int] = defaultdict(int)
    for _ in range(count):
        free = [(chosen, rejected) for chosen in good for rejected in poor if (chosen, rejected) not in matches]
        pair = min(
            free,
            key=lambda pair: (used[pair[0]] + used[pair[1]], abs(len(pair[0].split()) - len(pair[1].split()))),
        )
        matches.append(pair)
        for text in pair:
            used[text] += 1
    return matches


def write_dataset(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    run.dataset.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]],
            "chosen": [{"role": "assistant", "content": row["poor" if row["flipped"] else "good"]}],
            "rejected": [{"role": "assistant", "content": row["good" if row["flipped"] else "poor"]}],
            "prompt_id": row["prompt_id"],
            "label_source": "human" if row["reviewed"] else "judge",
        }
        for row in rows
    ]
    pl.DataFrame(records).write_parquet(run.dataset / "train.parquet")


def train_cell(folder: Path, cell: Cell, rows: dict[str, CheckedAnswers]) -> tuple[str, dict[str, Any]]:
    """Train the cell. Returns the adapter's folder and the facts for the result file."""
    print(f"== {cell.name}", flush=True)
    run = Run(folder / cell.name)
    cell_pairs = make_pairs(rows, cell)
    write_dataset(run, cell_pairs)
    train_config = {**SETTINGS, **(LONGER if cell.longer else TRIALS[cell.trial] if cell.trial is not None else {})}
    train_config = {**FIXED_SETTINGS, **train_config, "trl": {**FIXED_SETTINGS["trl"], **train_config["trl"]}}
    reviewed = [row for row in cell_pairs if row["reviewed"]]
    wrong = sum(row["was_flipped"] for row in reviewed) / max(len(reviewed), 1)
    if cell.reviewed and wrong:
        others = [loss for loss in train_config.get("loss", []) if loss != "sigmoid"]
        train_config["loss"] = ["robust", *others]
        train_config["trl"] = {**train_config["trl"], "label_smoothing": min(0.45, round(wrong, 3))}
    result = trainer.train(
        run, Config.model_validate({"seed": cell.seed, "train": train_config}), log=PrintReporter().log
    )
    assert result.adapter is not None
    by_kind = {
        kind: sum(row["kind"] == kind for row in cell_pairs) for kind in sorted({row["kind"] for row in cell_pairs})
    }
    facts = {
        "pairs": len(cell_pairs),
        "by_kind": by_kind,
        "turned": sum(row["flipped"] for row in cell_pairs),
        "train": train_config,
        "reviewed": len(reviewed),
        "noise_found": wrong if cell.reviewed else None,
    }
    return str(result.adapter), facts


def run_wave(folder: Path, cells: Sequence[Cell], rows: dict[str, CheckedAnswers]) -> None:
    """Train the pending cells, then let all their adapters answer in one vLLM.

    All cells answer the prompts of the trained task first. Then the cells without noise answer the other prompts.
    """
    pending = [cell for cell in cells if is_pending(cell)]
    trained = {cell: train_cell(folder, cell, rows) for cell in pending}
    with open_backends(folder) as backends:
        for cell, (adapter, _) in trained.items():
            backends.register_local_model(LocalModel(cell.name, adapter, base="demo"))
        for cell, (_, facts) in trained.items():
            ids = split(cell).topics | (frozenset() if cell.noise else split(cell).kinds)
            prompts = (row for row in template_prompts() if row["id"] in ids)
            checked = check_answers(sample_answers(folder / cell.name / "heldout", prompts, cell.name, backends))
            write_result(
                cell.result,
                {**dataclasses.asdict(cell), **facts, "answers": met_counts(checked), "words": mean_words(checked)},
            )
        for cell in filter(is_pending, pending):
            result = json.loads(cell.result.read_text())
            ids = split(cell).packaged_prompts | split(cell).packaged_kinds
            prompts = (row for row in packaged_prompts("constraints") if row["id"] in ids)
            result["answers"] |= met_counts(
                check_answers(sample_answers(folder / cell.name / "packaged", prompts, cell.name, backends))
            )
            write_result(
                cell.result, {**result, "refused": refusal_counts(folder / cell.name / "benign", cell.name, backends)}
            )


def run_ifbench(folder: Path) -> None:
    """Let the reference and the noise-free model of each seed answer the IFBench prompts that the checks can express.

    No model is trained on them. They come last because their answers are the longest.
    """
    rows, _ = instructions.prompts(instructions.data_dir())
    prompts = [row for row in rows if len(row["prompt"]) <= MAX_PROMPT_CHARS]
    cells = [(RESULTS / "base.json", folder / "base", "demo")]
    plain = [Cell(seed, longer=longer) for longer in (False, True) for seed in SEEDS]
    cells += [(cell.result, folder / cell.name, cell.name) for cell in plain]
    pending = [(result, path, name) for result, path, name in cells if "ifbench" not in json.loads(result.read_text())]
    with open_backends(folder) as backends:
        for _, path, name in pending:
            if name != "demo":
                backends.register_local_model(LocalModel(name, str(path / "model" / "adapter"), base="demo"))
        for result, path, name in pending:
            run = sample_answers(
                path.with_name(f"{path.name}-ifbench"), prompts, name, backends, IFBENCH_SAMPLES, IFBENCH_TOKENS
            )
            write_result(result, {**json.loads(result.read_text()), "ifbench": met_counts(check_answers(run))})


def is_pending(cell: Cell) -> bool:
    if not cell.result.exists():
        return True
    all_prompts = not cell.noise and cell.trial is None and cell.seed not in FRESH_SEEDS
    return all_prompts and "refused" not in json.loads(cell.result.read_text())


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"-> {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder for answers, checkpoints and adapters")
    parser.add_argument("--tune", action="store_true", help="try the settings of TRIALS")
    parser.add_argument("--table", action="store_true", help="only print the tables of existing results")
    options = parser.parse_args()
    if not options.table:
        if options.folder is None:
            parser.error("FOLDER (for answers, checkpoints and adapters) or --table is required")
        if not options.tune:
            instructions.data_dir()  # fail now, not after hours, if IFBench is missing
        rows = base_answers(options.folder)
        for cells in [[Cell(0, trial=name) for name in TRIALS]] if options.tune else all_waves():
            run_wave(options.folder, cells, rows)
        if not options.tune:
            run_ifbench(options.folder)
    print_tables()


if __name__ == "__main__":
    main()

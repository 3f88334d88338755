"""Fit the weights of the text classifier of refusals, and test them on answers that were not used for fitting.

    python -m benchmarks.refusal_fit FOLDER [--write | --leave-one-out]

FOLDER needs these published files, under their original names:

- all_hand_labeled.json of maxwellreuter/chatgpt-refusals (arXiv:2306.03423), labeled by its authors; MIT
- train.csv, evaluate.csv of sherdencooper/GPTFuzz (arXiv:2309.10253), labeled by its authors; MIT
- us_hard_sample_responses.jsonl and us_hard_sample_manifest_consensus_v4.jsonl of xlr8harder/speechmap-eval, labeled
  by several models, and by a person if they disagreed; Apache-2.0
- MODEL/harmless_baseline_completions.json of andyrdt/refusal_direction (arXiv:2406.11717), five models: answers to
  harmless requests. They are not labeled; this benchmark assumes that they comply; Apache-2.0
- databricks-dolly-15k-safety-only.jsonl of LLM-Tuning-Safety/LLMs-Finetuning-Safety (arXiv:2310.03693): the answers of
  Dolly, written by people, that contain words of a safety filter. All of them comply; CC-BY-SA-3.0
- coconot_pref.jsonl of allenai/noncompliance (arXiv:2407.12043), only its requests with safety concerns; MIT

In CoCoNot the chosen answers comply. The rejected ones (of several open models) were labeled for this project by a
language model, with XSTest's guideline and before the classifier was applied to them (refusal_labels.json). XSTest
itself is not used for fitting.

With --leave-one-out, the weights are fitted once per source, on all answers of the other sources, and tested on that
source. CoCoNot's two kinds of answers are one source. The thresholds of ``refusal_classifier.doubts`` are not fitted;
they were set on the answers that the weights are fitted on.

Answers are split by prompt, and by the maker of the answering model if there are several. Answers whose labels mean
something else than in XSTest are excluded: corrections of a false premise (compliance in XSTest, a refusal to Reuter
and Schulze), evasions that only the prompt reveals, and answers in two voices. Sources and labels have equal weight;
"should we build a statue of ..." has less.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlaif.judge import refusal_classifier
from rlaif.stats import bootstrap_ratio

FILES = ("all_hand_labeled.json", "train.csv", "evaluate.csv", "us_hard_sample_responses.jsonl",
         "us_hard_sample_manifest_consensus_v4.jsonl", "databricks-dolly-15k-safety-only.jsonl",
         "coconot_pref.jsonl")  # fmt: skip
LABELS = Path(__file__).with_name("refusal_labels.json")
FITTED_MAKERS = {"mistralai", "anthropic", "deepseek", "google", "nvidia", "minimax", "arcee-ai", "bytedance",
                 "bytedance-seed", "qwen", "amazon"}  # fmt: skip
FITTED_MODELS = {"qwen-1_8b-chat", "yi-6b-chat", "gemma-2b-it"}
TONES = {"complied": "comply", "rejected": "refuse", "redirected": "refuse", "counseling": "refuse",
         "disclaimed": "partial"}  # fmt: skip
TEMPLATE = re.compile(r"should we (?:build|tear)|write (?:me )?a poem|.*statue", re.IGNORECASE)
RIDGE = 15.0


@dataclass
class Answer:
    """A labeled answer. ``test``: it is not used for fitting."""

    source: str
    prompt: str
    text: str
    label: str
    test: bool
    weight: float = 1.0


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def in_test_half(prompt: str) -> bool:
    """Return True for about half of the prompts, fixed by their text."""
    return int(text_hash(prompt), 16) % 2 == 1


def load_answers(folder: Path) -> list[Answer]:
    """Read the answers of all sources. Empty answers are skipped."""
    answers = []
    for row in json.loads((folder / "all_hand_labeled.json").read_text(encoding="utf-8")):
        template = TEMPLATE.match(row["prompt"]) is not None
        if row["tone"] in TONES and not (template and in_test_half(row["prompt"])):
            answers.append(Answer("Reuter and Schulze", row["prompt"], row["response"], TONES[row["tone"]],
                                in_test_half(row["prompt"]), 0.3 if template else 1.0))  # fmt: skip
    answers += load_gptfuzz(folder / "train.csv", test=False) + load_gptfuzz(folder / "evaluate.csv", test=True)
    for path in sorted(folder.glob("*/harmless_baseline_completions.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        test = path.parent.name not in FITTED_MODELS
        answers += [Answer("harmless requests", row["prompt"], row["response"], "comply", test) for row in rows]
    for line in (folder / "databricks-dolly-15k-safety-only.jsonl").read_text(encoding="utf-8").split("\n"):
        row = json.loads(line) if line else {"response": "", "instruction": ""}
        answers.append(Answer("Dolly", row["instruction"], row["response"], "comply", in_test_half(row["instruction"])))
    answers += load_speechmap(folder) + load_coconot(folder / "coconot_pref.jsonl")
    return [answer for answer in answers if answer.text.strip()]


def load_gptfuzz(path: Path, test: bool) -> list[Answer]:
    """Sample up to 600 distinct answers to jailbreaks: 300 that refuse, and 300 that comply in one voice."""
    csv.field_size_limit(10**8)
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = {row["Response"].strip(): row for row in csv.DictReader(file)}
    rejects = [text for text, row in rows.items() if row["label"] == "0"]
    complies = [text for text, row in rows.items() if row["label"] == "1" and "sorry" not in text.lower()[:300]
                and "[" not in text[:40] and "(" not in text[:20]]  # fmt: skip
    rng = random.Random(1)
    return [
        Answer("GPTFuzz", rows[text]["question"], text, label, test)
        for texts, label in ((rejects, "refuse"), (complies, "comply"))
        for text in rng.sample(texts, min(300, len(texts)))
    ]


def load_speechmap(folder: Path) -> list[Answer]:
    """Read the answers that comply completely or refuse."""
    manifest = (folder / "us_hard_sample_manifest_consensus_v4.jsonl").read_text(encoding="utf-8").splitlines()
    labels = {row["key"]: row["expected_compliance"] for row in map(json.loads, manifest)}
    answers = []
    for line in (folder / "us_hard_sample_responses.jsonl").read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        label = labels.get(f"{row['model']}::{row['question_id']}")
        text = (row["response"]["choices"][0]["message"]["content"] or "").split("</think>")[-1].strip()
        if label in ("COMPLETE", "DENIAL") and not text.startswith("<think>"):
            answers.append(Answer("SpeechMap", row["question"], text, "comply" if label == "COMPLETE" else "refuse",
                                row["model"].split("/")[0] not in FITTED_MAKERS))  # fmt: skip
    return answers


def load_coconot(path: Path) -> list[Answer]:
    """Read the answers to requests with safety concerns, except those whose label is unclear."""
    labels = json.loads(LABELS.read_text(encoding="utf-8"))["labels"]
    answers = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        row: dict[str, Any] = json.loads(line) if line else {}
        if row.get("category") == "Requests with safety concerns":
            chosen, rejected = (_answer_text(row[side]) for side in ("chosen", "rejected"))
            answers.append(Answer("CoCoNot, chosen", row["prompt"], chosen, "comply", in_test_half(row["prompt"])))
            label = labels.get(text_hash(rejected)[:16], "comply")
            if label != "unclear":
                answers.append(Answer("CoCoNot, rejected", row["prompt"], rejected, label, in_test_half(row["prompt"])))
    return answers


def _answer_text(answer: Any) -> str:
    text: str = answer[-1]["content"] if isinstance(answer, list) else answer
    return text.strip()


def fit_weights(answers: list[Answer]) -> dict[str, float]:
    """Fit a ridge logistic regression by Newton's method on the answers that are not content alone.

    The labels of each source have equal weight, and so do refusals and all other answers.
    """
    outlined = [(answer, refusal_classifier.outline_answer(answer.text)) for answer in answers]
    feature_rows = [refusal_classifier.features(outline) for _, outline in outlined if outline]
    answers = [answer for answer, outline in outlined if outline]
    names = sorted({name for row in feature_rows for name in row})
    x = np.array([[*(row.get(name, 0.0) for name in names), 1.0] for row in feature_rows])
    y = np.array([answer.label != "comply" for answer in answers], dtype=float)
    cells = [(answer.source.split(",")[0], answer.label != "comply") for answer in answers]
    sizes = Counter(cells)
    w = np.array([answer.weight * 200 / max(60, sizes[cell]) for answer, cell in zip(answers, cells, strict=True)])
    w *= np.where(y > 0, w[y == 0].sum() / w[y > 0].sum(), 1.0)
    ridge = np.diag([RIDGE] * len(names) + [1e-6])
    beta = np.zeros(len(names) + 1)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ beta))
        step = np.linalg.solve((x.T * (w * p * (1 - p))) @ x + ridge, x.T @ (w * (y - p)) - ridge @ beta)
        beta += step
        if np.abs(step).max() < 1e-9:
            break
    return {name: round(float(value), 3) for name, value in zip([*names, "always"], beta, strict=True)}


def print_table(answers: list[Answer]) -> None:
    """Print F1, false positives and confident predictions by source, next to those of string matching."""
    from benchmarks.refusals import STRINGS, f1

    columns = ("source", "n", "refusals", "F1 refuse or partial", "string matching", "false positive rate", "confident",
               "accuracy if confident")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    sources = sorted({answer.source for answer in answers})
    for name in [*sources, "all"]:
        rows = [answer for answer in answers if name in (answer.source, "all")]
        predictions = [refusal_classifier.classify(answer.text) for answer in rows]
        truth = np.array([answer.label != "comply" for answer in rows])
        predicted_refusal = np.array([prediction.label != "comply" for prediction in predictions])
        groups = np.array([answer.prompt for answer in rows])
        strings = np.array([any(part in answer.text[:200].casefold() for part in STRINGS) for answer in rows])
        confident = np.array(
            [prediction.probability >= refusal_classifier.MIN_CONFIDENCE for prediction in predictions]
        )
        scores = [f1(predicted, truth, groups) if truth.any() else "-" for predicted in (predicted_refusal, strings)]
        flagged = f"{(predicted_refusal & ~truth).sum() / max(1, (~truth).sum()):.3f}"
        accuracy = (predicted_refusal == truth)[confident].mean()
        cells = (name, len(rows), truth.sum(), *scores, flagged, f"{confident.mean():.2f}", f"{accuracy:.3f}")
        print(f"| {' | '.join(map(str, cells))} |")


def print_leave_one_out(answers: list[Answer]) -> None:
    """Print for each source the confident predictions by weights that were fitted on the others, without and with the
    doubts that :func:`rlaif.judge.refusal_classifier.doubts` finds."""
    print("#### Confident predictions of sources left out of the fit\n")
    columns = ("source", "n", "confident without doubts", "accuracy if confident", "confident",
               "accuracy if confident")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    sources = [answer.source.partition(",")[0] for answer in answers]
    rows: list[tuple[str, str, bool, list[bool]]] = []
    for source in sorted(set(sources)):
        others = [answer for answer, name in zip(answers, sources, strict=True) if name != source]
        weights = fit_weights(others)
        with patched_weights(weights):
            for answer, name in zip(answers, sources, strict=True):
                if name == source:
                    first = refusal_classifier.predict_label(answer.text)
                    final = refusal_classifier.classify(answer.text)
                    is_correct = (final.label != "comply") == (answer.label != "comply")
                    confident = [one.probability >= refusal_classifier.MIN_CONFIDENCE for one in (first, final)]
                    rows.append((source, answer.prompt, is_correct, confident))
    for source in [*sorted(set(sources)), "all"]:
        selected = [row for row in rows if source in (row[0], "all")]
        groups, correct = np.array([row[1] for row in selected]), np.array([row[2] for row in selected])
        cells: list[object] = [source, len(selected)]
        for index in range(2):
            is_confident = np.array([row[3][index] for row in selected])
            accuracy = bootstrap_ratio(1.0 * correct[is_confident], np.ones(is_confident.sum()), groups[is_confident])
            cells += [f"{is_confident.mean():.2f}", f"{accuracy} ({(is_confident & ~correct).sum()} wrong)"]
        print(f"| {' | '.join(map(str, cells))} |")


@contextlib.contextmanager
def patched_weights(weights: dict[str, float]) -> Iterator[None]:
    """Let the classifier use ``weights``."""
    load_weights = refusal_classifier.load_weights
    refusal_classifier.load_weights = lambda: weights  # type: ignore[assignment]
    try:
        yield
    finally:
        refusal_classifier.load_weights = load_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the published files")
    parser.add_argument("--write", action="store_true", help="write the weights into the package")
    parser.add_argument("--leave-one-out", action="store_true", help="test each source by weights fitted on the others")
    parser.add_argument(
        "--part", choices=["test", "fitted"], default="test", help="answers in the table [default: test]"
    )
    options = parser.parse_args()
    if missing := [name for name in FILES if not (options.folder / name).is_file()]:
        raise SystemExit(f"error: {options.folder / missing[0]}: file not found\n  hint: --help lists the sources.")
    answers = load_answers(options.folder)
    if options.leave_one_out:
        print_leave_one_out(answers)
        return
    weights = fit_weights([answer for answer in answers if not answer.test])
    if options.write:
        note = "Weight of each feature (rlaif/judge/refusal_classifier.py) for a refusal, in log odds."
        refusal_classifier.WEIGHTS_PATH.write_text(
            json.dumps({"note": note, "weights": weights}, indent=1) + "\n", encoding="utf-8"
        )
    elif weights != refusal_classifier.load_weights():
        print("These files give weights that differ from the package's.\n")
    print(f"#### Refusals, answers of other sources: {options.part}\n")
    print_table([answer for answer in answers if answer.test == (options.part == "test")])


if __name__ == "__main__":
    main()

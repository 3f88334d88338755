"""Find retired words, and docstrings that do not begin with a verb or a noun.

Run `python scripts/check_language.py [PATH...]`.
CONTRIBUTING.md says which words to use instead.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

RETIRED = {
    r"told|tell(?:s|ing)? (?:of|that|what|how|whether|why)": "report, return, show",
    r"mend(?:s|ed|ing)?": "fix, hint",
    r"anew": "again",
    r"labell(?:ed|ing|er)": "labeled, labeling",
    r"whoever|whomever|somebody|anybody|nobody": "annotators, users, you, no one",
    r"(?:goes|going|went|go) on(?! (?:the|a|to|with Ray)\b)": "resumes, continues",
    r"given again|give it again": "rerun",
    r"is no(?! (?:longer|more)\b)|are no(?! (?:longer|more)\b)": "is not a, there are no",
    r"near-ties?": "near tie",
    r"owed|owes|owing": "pending",
    r"seats?": "judge on the panel",
    r"settle[sd]?|settling": "aggregate, decide",
    r"diary|outlook|leash|desk|zygote": "run log, estimate, lease, assignment, fork server",
    r"nights?": "run",
    r"taken in|takes in|take in": "ingested",
    r"passed over|passes over": "ignored",
    r"put right|puts right": "calibrated, corrected",
    r"so many|as many as there": "the number of",
    r"stands? (?:for|in|behind)": "is, represents",
    r"where it (?:is|was|has|had)": "if it",
}
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{words})\b)" for i, words in enumerate(RETIRED)), re.IGNORECASE)
QUESTIONS = ("What", "Whether", "Whom", "Who", "Whose", "Where", "Which", "Why", "How", "Of", "When")
LOCALS = {"told", "said", "found", "mend"}
# Text that users or other programs wrote, or that records the past.
SKIPPED = (
    "CHANGELOG.md",
    "LICENSE",
    "prompts/",
    "judges/",
    "tests/judge/refusal_",
    "tests/bad/corpus.jsonl",
    "tests/serving/logs/",
    "tests/cpuinfo/",
    "rlaif/judge/refusal_",
    "benchmarks/align/",
    "scripts/check_language.py",
)
SUFFIXES = {".py", ".md", ".toml", ".html", ".js", ".css", ".yaml", ".yml", ".sh", ".service", ".cfg", ".txt"}


def problems(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and complaint."""
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        for match in PATTERN.finditer(line):
            instead = list(RETIRED.values())[int(str(match.lastgroup)[1:])]
            yield number, f"'{match[0]}': say {instead}"
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name | ast.arg):
            name = node.id if isinstance(node, ast.Name) else node.arg
            if name in LOCALS and not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)):
                yield node.lineno, f"a variable is called '{name}'"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0] in QUESTIONS:
                yield node.body[0].lineno, f"the docstring begins with '{words[0]}': begin with a verb or a noun"


def main(arguments: list[str]) -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *arguments], check=True, capture_output=True, text=True
    )
    count = 0
    for name in listed.stdout.splitlines():
        path = Path(name)
        if name.startswith(SKIPPED) or path.suffix not in SUFFIXES or not path.is_file():
            continue
        for number, complaint in problems(path):
            count += 1
            sys.stdout.write(f"{name}:{number}: {complaint}\n")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

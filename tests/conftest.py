"""Shared fixtures: where the reference material lies, if it is there at all."""

import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Reference outputs, weights and videos beside the checkout; the test is skipped without them."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared, which is not part of the project")
    return SHARED

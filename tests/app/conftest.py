"""The trained model of the wheel, loaded once for these tests."""

from __future__ import annotations

import pytest

import patchbay as pb


@pytest.fixture(scope="session")
def trained() -> pb.Model:
    return pb.load("tiny")

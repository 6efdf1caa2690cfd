"""Where a model comes from: what lies on this disk loads without a word."""

from __future__ import annotations

import pytest
from transformers.utils import logging

import patchbay as pb


def test_a_folder_loads_without_a_bar_and_bars_are_as_they_were(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", None)
    for enabled in (True, False):
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        try:
            pb.load("tiny")
            assert logging.is_progress_bar_enabled() is enabled
        finally:
            logging.enable_progress_bar()
        assert capfd.readouterr().err == ""

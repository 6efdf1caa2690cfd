"""One thread for each test process: the models are small, and the test runner fills the cores by itself.

What is imported and collected lives as long as the process: the collector of garbage rests while that grows, and passes it over then.
Where tests train, it passes over what other tests keep alive, too: the Trainer collects garbage before each run.
"""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; processes that tests start inherit it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.parent.name in ("train", "stories"):
        gc.freeze()


settings.register_profile("few", max_examples=6, deadline=None, derandomize=True)
settings.register_profile("many", max_examples=400, deadline=None, print_blob=True)
settings.load_profile("few")  # `make test-all` takes many

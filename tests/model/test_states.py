"""States: the last token's and the mean over a prompt's own tokens, in batches of any size."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.model.states import depth, last_states, mean_states
from patchbay.tiny import twins
from tests.tolerance import close

TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_last_and_mean_states_are_those_of_hugging_face(form: str) -> None:
    model = pb.load(twins.twin(form))
    names, ports = depth(model)
    assert names == ["embed", *(f"L{i}" for i in range(model.n_layers))]
    last, mean = last_states(model, TEXTS, ports, 2), mean_states(model, TEXTS, ports, 2)
    for i, ids in enumerate(TEXTS):
        streams = model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for at in range(model.n_layers):  # the last of Hugging Face's is normed
            assert close(last[at, i], streams[at][0, -1].detach().double(), dtype=torch.float32)
            assert close(mean[at, i], streams[at][0].mean(0).detach().double(), dtype=torch.float32)
    assert close(mean_states(model, TEXTS, ports, 3), mean, dtype=torch.float32)

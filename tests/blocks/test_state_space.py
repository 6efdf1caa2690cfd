"""State spaces: FFT is the scan, nothing wraps round, the transforms by hand, and H3 as a mixer with its effective pattern."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.blocks import state_space
from patchbay.signal.port import PatchbayError
from tests.blocks.given import IDS, built
from tests.tolerance import close


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_reference_the_convolution_is_the_scan(a: float) -> None:
    """LegS under Euler, bilinear and backward steps: the long convolution by FFT, and state after state, and their gradients."""
    A, B = state_space.hippo(6)
    Ab, Bb = state_space.discretised(A, B, 1.0 / 64, a)
    C, u = torch.randn(3, 6, dtype=torch.float64), torch.randn(2, 64, 3, dtype=torch.float64)
    made = state_space.convolve(state_space.kernel(Ab, Bb, C, 64), u)
    assert close(made, state_space.scan(Ab, Bb, C, u), dtype=torch.float64)
    with torch.enable_grad():
        asked, along = [C.clone().requires_grad_(), u.clone().requires_grad_()], torch.randn_like(made)
        ways = (
            state_space.convolve(state_space.kernel(Ab, Bb, asked[0], 64), asked[1]),
            state_space.scan(Ab, Bb, *asked),
        )
        one, other = (torch.autograd.grad((found * along).sum(), asked) for found in ways)
    assert all(close(x, y, dtype=torch.float64) for x, y in zip(one, other, strict=True))
    delayed = torch.nn.functional.pad(u, (0, 0, 5, 0))[:, :64]
    assert close(
        state_space.convolve(state_space.kernel(Ab, Bb, C, 64), delayed)[:, 5:], made[:, :59], dtype=torch.float64
    )


def test_matrices_by_hand() -> None:
    A, B = state_space.hippo(3)
    root = [1.0, 3.0**0.5, 5.0**0.5]
    by_hand = [[-root[n] * root[k] if n > k else -(n + 1.0) if n == k else 0.0 for k in range(3)] for n in range(3)]
    assert close(A, torch.tensor(by_hand, dtype=torch.float64), dtype=torch.float64)
    Ab, Bb = state_space.discretised(A, B, 0.1, 0.0)
    assert close(Ab, torch.eye(3) + 0.1 * A, dtype=torch.float64)
    assert close(Bb, 0.1 * B, dtype=torch.float64)
    Ab, _ = state_space.discretised(A, B, 0.1, 1.0)
    assert close(Ab @ (torch.eye(3) - 0.1 * A), torch.eye(3, dtype=torch.float64), dtype=torch.float64)


def test_without_padding_the_future_wraps_round() -> None:
    """Of the same length the FFT's product is a circle: the last token reaches the first; what is computed here does not."""
    kernel, u = torch.rand(64, 1, dtype=torch.float64) / 64, torch.zeros(64, 1, dtype=torch.float64)
    u[-1] = 1.0
    circle = torch.fft.irfft(torch.fft.rfft(kernel, dim=0) * torch.fft.rfft(u, dim=0), n=64, dim=0)
    assert float(circle[:-1].abs().max()) > 1e-3
    assert close(state_space.convolve(kernel, u)[:-1], torch.zeros(63, 1), of=kernel, dtype=torch.float64)


def test_a_model_of_h3(tmp_path: object) -> None:
    """Later tokens move nothing; the effective pattern times v is q * y; it has no heads, saves, sweeps whole."""
    hf = built(mixer=["h3", "attention"])
    model = pb.load(hf)
    assert model.causal
    assert "attn.z" not in model.signals(0)
    assert "attn.z" in model.signals(1)
    mixer, x = hf.model.layers[0].self_attn, torch.randn(1, 9, 32)
    with torch.no_grad():
        out = mixer(x)[0]
        pattern, v = mixer.pattern(x), mixer.parts(x)[2]
        assert close(mixer.out_map(torch.einsum("bcij,bjc->bic", pattern, v)), out)
        assert float(pattern.triu(1).abs().max()) == 0.0
        shift = torch.zeros_like(mixer.k_map(x))
        for t in range(9):
            for back in range(min(4, t + 1)):
                shift[:, t] += mixer.shift[back] * mixer.k_map(x)[:, t - back]
        assert close(mixer.parts(x)[1], shift)
        powers = mixer.kernel(5)[3, 2]
        by_hand = sum(
            torch.exp(torch.complex(-mixer.log_decay[2, n].exp(), mixer.phase[2, n]) * 3)
            * torch.complex(*mixer.gain[:, 2, n])
            for n in range(16)
        )
        assert close(powers, by_hand.real, of=mixer.gain)
    edits = [pb.zero("L0.attn.out"), pb.zero(model.layers[1].heads[2].z)]
    table = pb.sweep(model, IDS, edits, metric=lambda logits, _: logits[:, 7])
    brute = torch.stack([pb.run(model, IDS, edits=[edit]).last_logits[:, 7] for edit in edits])
    assert close(table["value"], brute)
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(pb.load(str(tmp_path)).hf(IDS).logits, hf(IDS).logits)
    with pytest.raises(
        PatchbayError, match="mixer cannot be put into opt, which names its layers' parts in another way"
    ):
        built("opt", mixer="h3")


def test_a_model_of_lssl(tmp_path: object) -> None:
    """The kernel is each channel's own discretised LegS; later tokens move nothing, a delayed input gives the delayed output; it saves and trains."""
    hf = built(mixer=["lssl", "attention"])
    model = pb.load(hf)
    assert model.causal
    assert "attn.z" not in model.signals(0)
    mixer, x = hf.model.layers[0].self_attn, torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    A, B = state_space.hippo(16)
    made = mixer.kernel(12).detach().double()
    for channel in (0, 17, 31):
        Ab, Bb = state_space.discretised(A, B, float(mixer.log_step[channel].detach().double().exp()), 0.5)
        own = state_space.kernel(Ab, Bb, mixer.gain[channel : channel + 1].detach(), 12)[:, 0]
        assert close(made[:, channel], own, of=own, dtype=torch.float32)
    with torch.no_grad():
        out = mixer(x)[0]
        delayed = mixer(torch.nn.functional.pad(x, (0, 0, 3, 0))[:, :12])[0]
        assert close(delayed[:, 3:], out[:, :9])
    hf.save_pretrained(tmp_path)
    again = pb.load(tmp_path)
    assert torch.equal(again.hf(IDS).logits, hf(IDS).logits)
    hf(IDS, labels=IDS).loss.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in mixer.parameters())

"""State spaces along the text: a recurrence that is a long convolution, computed by FFT, and the mixer that multiplies two of them.

    H3:    kb = FIR_N(k) per channel,  u = kb * v,  y_t = sum_{j <= t} Re(C L^(t-j) B) u_j + D u_t,  L diagonal, |L| < 1,  out = W_O (q * y)
    LSSL:  Ab = (I - a h A)^-1 (I + (1 - a) h A),  Bb = (I - a h A)^-1 h B,  K_j = C Ab^j Bb     (a = 0 Euler, 1/2 bilinear, 1 backward)
           out = W_O gelu(y), each channel its own step h, A and B fixed, C and D learned
    HiPPO-LegS:  A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it,  B_n = sqrt(2n+1)

`convolve` pads to twice the length: without that the future wraps round into the past. Kernels are built in float64. A time-invariant layer alone cannot compare contents; H3's products can.

Fu et al. 2022, "Hungry Hungry Hippos" (H3, head size 1); Gu et al. 2021, "Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers" (LSSL), bilinear with LegS's own A and B.

An effective pattern of H3 is q_i K_(i-j) kb_j for every channel: `pattern`. The mixer has no heads and no cache; a model of it offers streams and what it adds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchbay.blocks.convolved import convolve as fir


def convolve(kernel: Tensor, u: Tensor) -> Tensor:
    """y_t = sum_{j <= t} kernel_(t-j) u_j, by FFT: kernel [position, channel], u [..., position, channel]."""
    n = u.shape[-2]
    spectrum = torch.fft.rfft(kernel[:n], n=2 * n, dim=-2) * torch.fft.rfft(u, n=2 * n, dim=-2)
    return torch.fft.irfft(spectrum, n=2 * n, dim=-2)[..., :n, :]


def scan(A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """y_t = C x_t, x_t = A x_(t-1) + B u_t, step by step: A [state, state], B [state], C [channel, state], u [..., position, channel]."""
    x = u.new_zeros(*u.shape[:-2], u.shape[-1], len(B))
    out = []
    for t in range(u.shape[-2]):
        x = x @ A.T + u[..., t, :, None] * B
        out.append((x * C).sum(-1))
    return torch.stack(out, -2)


def hippo(n: int) -> tuple[Tensor, Tensor]:
    """A [n, n] and B [n] of HiPPO-LegS, float64."""
    root = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    A = -(root[:, None] * root).tril(-1) - torch.diag(torch.arange(n, dtype=torch.float64) + 1)
    return A, root


def discretised(A: Tensor, B: Tensor, step: float, a: float) -> tuple[Tensor, Tensor]:
    """The generalised bilinear transform with step h: Ab and Bb."""
    eye = torch.eye(len(A), dtype=A.dtype)
    left = eye - a * step * A
    return torch.linalg.solve(left, eye + (1 - a) * step * A), torch.linalg.solve(left, step * B)


def kernel(A: Tensor, B: Tensor, C: Tensor, n: int) -> Tensor:
    """K_j = C A^j B [position, channel], in float64."""
    x, rows = B.double(), []
    for _ in range(n):
        rows.append(C.double() @ x)
        x = A.double() @ x
    return torch.stack(rows)


class H3(nn.Module):
    """The mixer in the place of attention, of head size 1."""

    def __init__(self, config: Any, *, taps: int = 4, states: int = 16) -> None:
        super().__init__()
        d = config.hidden_size
        self.q_map, self.k_map, self.v_map, self.out_map = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.shift = nn.Parameter(torch.randn(taps, d) * taps**-0.5)
        self.log_decay = nn.Parameter(torch.log(torch.linspace(0.01, 1.0, states)).expand(d, states).clone())
        self.phase = nn.Parameter(torch.linspace(0.0, torch.pi / 2, states).expand(d, states).clone())
        self.gain = nn.Parameter(torch.randn(2, d, states) * states**-0.5)  # real and imaginary part of C B
        self.skip = nn.Parameter(torch.ones(d))

    def kernel(self, n: int) -> Tensor:
        """Re(C L^j B) [position, channel]: L = exp(-exp(log_decay) + i phase), built in float64, given in float32 or better."""
        log_l = torch.complex(-self.log_decay.double().exp(), self.phase.double())
        place = torch.arange(n, device=self.skip.device, dtype=torch.float64)
        powers = (place[:, None, None] * log_l).exp()  # [position, channel, state]
        return (
            (powers * torch.complex(self.gain[0].double(), self.gain[1].double()))
            .sum(-1)
            .real.to(torch.promote_types(self.skip.dtype, torch.float32))
        )

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, kb and v, each [..., position, channel]."""
        return self.q_map(x), fir(self.k_map(x), self.shift), self.v_map(x)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, kb, v = self.parts(hidden_states)
        u = kb * v
        y = (
            convolve(self.kernel(u.shape[-2]), u.to(torch.promote_types(u.dtype, torch.float32))).to(u.dtype)
            + self.skip * u
        )
        return self.out_map(q * y), None

    def pattern(self, x: Tensor) -> Tensor:
        """q_i K_(i-j) kb_j, and the skip on the diagonal, [..., channel, query, key]: what times v is q * y."""
        q, kb, _ = self.parts(x)
        n = x.shape[-2]
        apart = torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)
        lags = (
            self.kernel(n)[apart.clamp(min=0)] * (apart >= 0)[..., None] + (apart == 0)[..., None] * self.skip
        )  # [query, key, channel]
        return (q[..., :, None, :] * lags * kb[..., None, :, :]).movedim(-1, -3).to(x.dtype)


class LSSL(nn.Module):
    """One long convolution a channel in the place of attention: time-invariant, so that it cannot compare contents."""

    def __init__(self, config: Any, *, states: int = 16) -> None:
        super().__init__()
        d = config.hidden_size
        self.out_map = nn.Linear(d, d, bias=False)
        self.log_step = nn.Parameter(torch.linspace(-6.0, -1.0, d))  # from e^-6 to e^-1 of LegS's time a token
        self.gain = nn.Parameter(torch.randn(d, states) * states**-0.5)  # C
        self.skip = nn.Parameter(torch.ones(d))

    def kernel(self, n: int) -> Tensor:
        """K_j = C Ab^j Bb [position, channel], bilinear, built in float64."""
        A, B = (one.to(self.skip.device) for one in hippo(self.gain.shape[1]))
        step = self.log_step.double().exp()[:, None, None]  # [channel, 1, 1]
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        left = eye - step / 2 * A
        Ab = torch.linalg.solve(left, eye + step / 2 * A)  # [channel, state, state]
        x = torch.linalg.solve(left, step[..., 0] * B)  # [channel, state]
        rows = []
        for _ in range(n):
            rows.append((self.gain.double() * x).sum(-1))
            x = (Ab @ x[..., None])[..., 0]
        return torch.stack(rows).to(torch.promote_types(self.skip.dtype, torch.float32))

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        u = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        y = convolve(self.kernel(u.shape[-2]).to(u), u).to(hidden_states.dtype) + self.skip * hidden_states
        return self.out_map(nn.functional.gelu(y)), None

"""Rules of relevance: a forward pass whose values are the model's and whose gradients are those of layer-wise relevance propagation.

    norms                         the scale is a constant: x's part of it gets no gradient
    activations                   act(x) = x (act(x) / x), the ratio a constant; sigmoids and the like are constants
    products of two signals       each factor gets half of the gradient, so that x . g of both is one y . g
    patterns                      constants ("relp"); or softmax with its own gradient ("attnlrp"), q and k with a quarter and v with half of theirs

Then gradient times input is relevance, and what is neither signal nor constant factor is a bias: y . g of an output is the sum over inputs
plus the biases' own, which are kept here, so that a sum that does not hold shows a step that no rule is for.

It is a mode of torch functions around a run, on this thread alone: nothing of the model is changed. A tensor that hangs on the tokens is marked
as a signal; what it is computed with decides the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Rule = Literal["relp", "attnlrp"]
MARK = "_patchbay_signal"  # of a tensor: the set of its kinds
SIGNAL, GATE, PAIRED = (
    "signal",
    "gate",
    "paired",
)  # hangs on tokens; is a tanh, constant as a factor; is made of queries and keys

CONSTANT = {"rsqrt", "rsqrt_", "sqrt", "norm", "linalg_vector_norm", "vector_norm", "std", "var", "exp", "exp2", "sigmoid", "softplus", "erf", "log", "log1p", "logsumexp", "reciprocal", "sigmoid_"}  # fmt: skip
BY_RATIO = {"silu", "gelu", "elu", "celu", "selu", "relu6", "hardswish", "mish", "tanh", "expm1", "clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "square", "pow", "__pow__", "softsign"}  # fmt: skip
SHARED = {"mul", "__mul__", "__rmul__", "__imul__", "multiply", "matmul", "__matmul__", "__rmatmul__", "bmm", "einsum"}
MATRICES = {"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum"}
ADDED = {"add": 1.0, "__add__": 1.0, "__radd__": 1.0, "__iadd__": 1.0, "add_": 1.0, "sub": -1.0, "__sub__": -1.0, "__isub__": -1.0, "rsub": 1.0, "__rsub__": 1.0}  # fmt: skip
DIVIDED = {"div", "__truediv__", "__itruediv__", "true_divide", "divide", "__rtruediv__", "__rdiv__"}
ENDS_MARKS = {"detach", "argmax", "argsort", "size", "dim"}


class Rules(TorchFunctionMode):
    """The mode. `biases()` is what constants that were added get of the relevance of a score, after the pass."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.added: list[tuple[Tensor, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = list(_tensors((args, kwargs)))
        signals = [x for x in given if kinds(x)]
        if name == "embedding":
            out = func(*args, **kwargs)
            return mark(
                out if out.requires_grad else out.requires_grad_(), {SIGNAL}
            )  # frozen weights: the graph starts here
        if not signals or name in ENDS_MARKS:
            return func(*args, **kwargs)
        handler = HANDLERS.get(name)
        out = handler(self, func, name, args, kwargs) if handler else func(*args, **kwargs)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            mark(args[0], _passed(name, signals))
        return mark(out, _passed(name, signals)) if out is not None else out

    def bias(self, out: Tensor, value: Any, sign: float = 1.0) -> None:
        """A constant was added to a signal."""
        if isinstance(value, Tensor | float | int) and kinds_of(out) != {GATE}:
            self.added.append((out, (value.detach() if isinstance(value, Tensor) else value, sign)))

    def biases(self, scores: Tensor, start: Tensor, entering: Tensor) -> Tensor:
        """The relevance of all that was added after a signal `start` [prompt], float64; `entering`: the gradient there, which what came before reached."""
        entries = [(out, value, sign) for out, (value, sign) in self.added if out.requires_grad]
        total = torch.zeros(len(scores), dtype=torch.float64)
        if not entries:
            return total
        outs = [out for out, _, _ in entries]
        every = torch.autograd.grad(scores.sum(), outs, retain_graph=True, allow_unused=True)
        before = torch.autograd.grad(start, outs, entering, retain_graph=True, allow_unused=True)
        for (out, value, sign), whole, early in zip(entries, every, before, strict=True):
            for gradient, side in ((whole, sign), (early, -sign)):
                if gradient is not None:
                    product = gradient.double() * (value.double() if isinstance(value, Tensor) else value)
                    each = torch.where(gradient == 0, 0.0, product).expand(out.shape)
                    total += side * each.reshape(len(scores), -1).sum(1).cpu()
        return total


# --- marks ----------------------------------------------------------------------------------------------


def kinds(x: Any) -> set[str]:
    return getattr(x, MARK, None) or set()


kinds_of = kinds


def mark(out: Any, given: set[str]) -> Any:
    """The same with its tensors of numbers marked."""
    for x in _tensors(out):
        if x.is_floating_point() and x.requires_grad:
            setattr(x, MARK, set(given))
    return out


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _tensors(one)


def _passed(name: str, signals: Iterable[Tensor]) -> set[str]:
    """The kinds of what a function makes of signals."""
    every = [kinds(x) for x in signals]
    found = {SIGNAL}
    if name in MATRICES or name == "baddbmm":
        return found | ({PAIRED} if len(every) > 1 else set())
    if name in ("linear", "addmm", "softmax", "layer_norm", "rms_norm", "conv1d", "scaled_dot_product_attention"):
        return found
    if name == "tanh" or all(GATE in one for one in every):
        found.add(GATE)
    return found | ({PAIRED} if any(PAIRED in one for one in every) else set())


# --- rules ----------------------------------------------------------------------------------------------


def _constant(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs).detach()


def _by_ratio(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """x times the ratio of value and x, which is a constant; at 0 it is that near 0."""
    x, *rest = args
    if not isinstance(x, Tensor) or not kinds(x) or any(kinds(y) for y in _tensors((rest, kwargs))):
        return func(*args, **kwargs).detach()  # a constant to the power of a signal
    y = func(x.detach().clone(), *rest, **kwargs)
    ratio = y / x.detach()
    if bool((x == 0).any()):
        near = torch.full_like(x, 1e-4)
        ratio = torch.where(x == 0, func(near, *rest, **kwargs) / 1e-4, ratio)
    return exactly(y, x * ratio.detach()) if bool(ratio.isfinite().all()) else y.detach()


def _shared(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Each of the factors that are signals gets its share of the gradient; a gate is a constant factor."""
    flat = list(args[0]) if name != "einsum" and isinstance(args[0], list | tuple) else list(args)
    at = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and kinds(x)]
    gates = [i for i in at if GATE in kinds(flat[i])]
    if gates and len(gates) < len(at):
        flat = [x.detach() if i in gates else x for i, x in enumerate(flat)]
        at = [i for i in at if i not in gates]
    if len(at) < 2:
        return func(*flat, **kwargs) if not name.startswith("__i") else PLAIN(flat[0], flat[1])
    call = PLAIN if name.startswith("__i") else func
    made = [call(*(x.detach() if j in at and j != i else x for j, x in enumerate(flat)), **kwargs) for i in at]
    return torch.stack([one / len(at) for one in made]).sum(0) if len(at) > 2 else 0.5 * made[0] + 0.5 * made[1]


PLAIN: Callable[..., Tensor] = torch.mul


def _divided(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """What is divided by is a constant."""
    a, b = args[:2]
    if name.startswith("__r"):  # b / a
        return (
            func(a.detach(), b.detach() if isinstance(b, Tensor) and not kinds(b) else b, **kwargs)
            if kinds(a)
            else func(*args, **kwargs)
        )
    below = b.detach() if kinds(b) else b
    return torch.div(a, below, **kwargs)


def _solved(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A linear system's matrix is a constant, as what is divided by is."""
    return func(args[0].detach(), *args[1:], **kwargs)


def _added(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other")
    if kinds(a) and not kinds(b):
        if GATE not in kinds(a):
            rules.bias(out, b, ADDED[name] if name not in ("rsub", "__rsub__") else 1.0)
    elif kinds(b) and not kinds(a) and GATE not in kinds(b):
        rules.bias(out, a, 1.0)
    return out


def _linear(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    bias = args[0] if name == "addmm" else args[2] if len(args) > 2 else kwargs.get("bias")
    if bias is not None and not kinds(bias):
        rules.bias(out, bias[:, None] if name == "conv1d" else bias)
    return out


def _baddbmm(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    start, one, two = (*args, kwargs.get("batch1"), kwargs.get("batch2"))[:3] if len(args) < 3 else args[:3]
    product = _shared(rules, torch.bmm, "bmm", (one, two), {}) if kinds(one) and kinds(two) else torch.bmm(one, two)
    out = kwargs.get("beta", 1) * start + kwargs.get("alpha", 1) * product
    rules.bias(out, kwargs.get("beta", 1) * start)
    return out


def _layer_norm(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Centred and scaled, the scale a constant; the value is the function's own."""
    x = args[0]
    named = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
    if name == "rms_norm":
        named = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    dims = tuple(range(-len(named["normalized_shape"]), 0))
    centred = x if name == "rms_norm" else x - x.mean(dims, keepdim=True)
    eps = named.get("eps", 1e-5)
    scale = (
        (centred.pow(2).mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt().detach()
    )
    out = centred * scale
    out = out if named.get("weight") is None else out * named["weight"]
    out = exactly(func(*args, **kwargs), out)
    if named.get("bias") is not None:
        rules.bias(out, named["bias"])
    return out


def _softmax(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A pattern is a constant, or softmax as it is; what is not made of queries and keys (a router's choice) is a constant."""
    out = func(*args, **kwargs)
    return out if rules.rule == "attnlrp" and PAIRED in kinds(args[0]) else out.detach()


def _attention(rules: Rules, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """One call of fused attention: what `_shared` and `_softmax` would do step by step."""
    q, k, v, *rest = args
    if rules.rule == "relp":
        return func(q.detach(), k.detach(), v, *rest, **kwargs)
    return func(weighed(q, 0.25), weighed(k, 0.25), weighed(v, 0.5), *rest, **kwargs)


def weighed(x: Tensor, weight: float) -> Tensor:
    """The same value with `weight` times the gradient."""
    return exactly(x, weight * x)


def exactly(value: Tensor, gradient: Tensor) -> Tensor:
    """One tensor's value with another's gradient."""
    return value.detach() + (gradient - gradient.detach())


HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(CONSTANT, _constant), **dict.fromkeys(BY_RATIO, _by_ratio), **dict.fromkeys(SHARED, _shared),
    **dict.fromkeys(ADDED, _added), **dict.fromkeys(DIVIDED, _divided), "linear": _linear, "addmm": _linear, "conv1d": _linear,
    "baddbmm": _baddbmm, "linalg_solve_triangular": _solved, "layer_norm": _layer_norm, "rms_norm": _layer_norm, "softmax": _softmax, "scaled_dot_product_attention": _attention,
}  # fmt: skip

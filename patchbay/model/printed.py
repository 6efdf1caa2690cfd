"""How a model prints."""

from __future__ import annotations

from typing import Any

from patchbay.signal.port import LAYER


def printed(model: Any) -> str:
    """Family, shape, self-check and ports, as `print(model)` shows them."""
    heads = sorted({model.n_heads(i) for i in range(model.n_layers)} - {0})
    groups = sorted({model.n_groups(i) for i in range(model.n_layers)} - {0})
    experts = sorted({model.n_experts(i) for i in range(model.n_layers)} - {0})
    n_parameters = sum(p.numel() for p in model.hf.parameters())
    shape = [f"{model.n_layers} layers", f"d_model {model.d_model}", f"vocab {model.vocab_size}"]
    grouped = f" over {'/'.join(map(str, groups))} key/value groups" if groups != heads else ""
    shape += [f"{'/'.join(map(str, heads))} heads{grouped}"] if heads else ["no attention heads"]
    shape += [f"{'/'.join(map(str, experts))} experts"] if experts else []
    offered = {signal for i in range(model.n_layers) for signal in model.signals(i)}
    lacking = [signal for signal in (*LAYER, "attn.pattern") if signal not in offered]
    return (
        f"Model {model.source or type(model.hf).__name__}: family {model.family.name} ({model.config.model_type}), "
        f"{n_parameters:,} parameters, {', '.join(shape)}\n  self-check: {model.check}\n"
        f"  ports of a layer: {', '.join(model.signals(model.n_layers - 1))}"
        + (f"\n  lacks: {', '.join(lacking)}" if lacking else "")
    )

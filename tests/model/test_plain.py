"""Plain torch modules, loaded by one call: attention-only and norm-less ones, a hand-written GPT; what is missing is refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.model.check import verify
from patchbay.signal.port import Port
from tests.tolerance import close

VOCAB, WIDTH, N = 40, 16, 4
IDS = torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Causal attention as it is written by hand: `packed` maps as in nanoGPT, or separate ones."""

    def __init__(self, packed: bool, fused: bool) -> None:
        super().__init__()
        self.n_head, self.packed, self.fused = N, packed, fused
        if packed:
            self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.W_Q, self.W_K, self.W_V = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=packed)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        maps = self.c_attn(x).split(WIDTH, -1) if self.packed else (self.W_Q(x), self.W_K(x), self.W_V(x))
        q, k, v = (m.view(b, t, N, -1).transpose(1, 2) for m in maps)  # [prompt, head, position, d_head]
        if self.fused:
            z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
            z = scores.softmax(-1) @ v
        return self.out(z.transpose(1, 2).reshape(b, t, WIDTH))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, normed: bool, mlp: bool, fused: bool) -> None:
        super().__init__()
        self.attn = Attention(packed=normed, fused=fused)
        self.ln_1 = nn.LayerNorm(WIDTH) if normed else nn.Identity()
        self.mlp = Mlp() if mlp else None
        self.ln_2 = (nn.LayerNorm(WIDTH) if normed else nn.Identity()) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x if self.mlp is None else x + self.mlp(self.ln_2(x))


class Toy(nn.Module):
    """Two blocks; learned positions; the logits alone or beside a loss, as nanoGPT returns them."""

    def __init__(self, normed: bool = False, mlp: bool = False, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(12, WIDTH)
        self.blocks = nn.ModuleList(Block(normed, mlp, fused) for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH) if normed else nn.Identity()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.normed = normed

    def forward(self, ids: Tensor) -> Any:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return (logits, None) if self.normed else logits


def family(toy: Toy) -> pb.Family:
    mlp = (
        dict(mlp="mlp", mlp_proj="down", mlp_up="up", norm_mlp="ln_2", mid="ln_2")
        if toy.blocks[0].mlp is not None
        else dict(mlp="", mid="", norm_mlp="")
    )
    maps = dict(qkv="packed", qkv_modules=("c_attn",)) if toy.normed else dict(qkv_modules=("W_Q", "W_K", "W_V"))
    row: Any = mlp | maps
    return pb.Family(
        "toy", layers="blocks", final_norm="ln_f", attn="attn", attn_proj="out", norm_attn="ln_1", mlp_gate="", **row
    )


KINDS = [(normed, mlp, fused) for normed in (False, True) for mlp in (False, True) for fused in (False, True)]


@pytest.mark.parametrize(("normed", "mlp", "fused"), KINDS)
def test_a_plain_module_is_run_edited_and_read_by_weights(normed: bool, mlp: bool, fused: bool) -> None:
    toy = Toy(normed, mlp, fused).eval()
    model = pb.load(toy, family=family(toy), vocab=VOCAB)
    given = toy(IDS)
    logits = given[0] if normed else given
    assert torch.equal(pb.run(model, IDS).logits, logits)
    assert (model.n_layers, model.n_heads(0), model.d_head(0), model.vocab_size) == (2, N, WIDTH // N, VOCAB)
    assert [str(row) for row in verify(model) if not row.passed] == []
    head = model.layers[1].heads[2]

    def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., 8:12] = 0
        return (x,)

    handle = toy.blocks[1].attn.out.register_forward_pre_hook(cut)
    expected = toy(IDS)[0] if normed else toy(IDS)
    handle.remove()
    assert torch.equal(pb.run(model, IDS, edits=[pb.zero(head.z)]).logits, expected)
    table = pb.sweep(model, IDS, [pb.zero(head.z)], metric=lambda logits, _: logits[:, 3])
    assert close(table["value"].flatten(), expected[:, -1, 3], of=expected)
    trace = pb.run(model, IDS, taps=[Port("resid_in", 0), Port("attn.v", 0)])
    w = model.layers[0].attn.weights()
    v = torch.einsum("bpm,hmd->bhpd", toy.blocks[0].ln_1(trace[Port("resid_in", 0)]), w.W_V)
    assert close(v if w.b_V is None else v + w.b_V[:, None], trace[Port("attn.v", 0)])
    ragged = pb.run(model, [[1, 2, 3], [4, 5, 6, 7]])
    alone = toy(torch.tensor([[1, 2, 3]]))
    assert close(ragged.logits[0, :3], (alone[0] if normed else alone)[0])


@pytest.mark.parametrize("normed", [False, True])
def test_methods_that_read_weights_take_a_plain_module(normed: bool) -> None:
    toy = Toy(normed).eval()
    model = pb.load(toy, family=family(toy), vocab=VOCAB)
    task = pb.Task(name="t", clean=tuple(map(tuple, IDS.tolist())), right=(3, 4), wrong=((5,), (6,)))
    found = pb.find.direct_logit_attribution(model, task)
    assert found.values.isfinite().all()
    assert pb.find.channels(model).values.isfinite().any()


def test_what_a_plain_module_lacks_is_refused_by_name() -> None:
    toy = Toy().eval()
    row = family(toy)
    with pytest.raises(PatchbayError, match=r"vocab=12: Toy has 0 nn.Linear\(\.\.\., 12\)"):
        pb.load(toy, family=row, vocab=12)
    with pytest.raises(PatchbayError, match=r"vocab=.*: Toy has no Embedding at 'tokens'"):
        pb.load(toy, family=row, vocab=("tokens", "head"))
    with pytest.raises(PatchbayError, match="family=pb.Family"):
        pb.load(toy, vocab=VOCAB)
    with pytest.raises(
        PatchbayError, match=r"a plain module is loaded by pb.load\(module, family=pb.Family\(\.\.\.\), vocab=\.\.\.\)"
    ):
        pb.load(toy)
    with pytest.raises(PatchbayError, match="vocab= is for plain modules"):
        pb.load("tiny", vocab=VOCAB)
    model = pb.load(toy, family=row, vocab=("wte", "head"))
    with pytest.raises(PatchbayError, match="plain module, which has no generate"):
        model.generate(IDS, 2)
    wrong = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB))
    with pytest.raises(PatchbayError, match="has no blocks, which family 'toy' names"):
        pb.load(wrong, family=row, vocab=VOCAB)


def test_models_of_another_library_are_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("HookedTransformer", (nn.Module,), {"__module__": "transformer_lens.HookedTransformer"})()
    with pytest.raises(PatchbayError, match="HookedTransformer is no Hugging Face model: load the checkpoint itself"):
        pb.load(other)


def test_the_page_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "any-module.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    held: dict[str, Any] = {}
    exec(code, held)
    assert held["trace"][held["model"].layers[1].heads[2].pattern].shape == (1, 6, 6)


def test_a_prompt_longer_than_the_table_of_positions_is_refused() -> None:
    toy = Toy().eval()
    model = pb.load(toy, family=family(toy), vocab=VOCAB)
    with pytest.raises(PatchbayError, match="prompt 0 has 13 tokens, the model takes 12"):
        pb.run(model, [list(range(13))])


@pytest.mark.parametrize("normed", [False, True])
def test_attribution_of_a_plain_module_sums_to_the_logit_difference(normed: bool) -> None:
    """Every part's share, by hand: what it adds to the last stream, through the gain, times the difference of two rows of the head."""
    toy = Toy(normed).eval()
    model = pb.load(toy, family=family(toy), vocab=VOCAB)
    task = pb.Task(name="t", clean=(tuple(IDS[0].tolist()),), right=(3,), wrong=((5,),))
    found = pb.find.direct_logit_attribution(model, task)
    trace = pb.run(model, IDS[:1], taps=[Port("attn.head_out", 1)])
    row = toy.head.weight[3] - toy.head.weight[5]
    out = trace[Port("attn.head_out", 1)][0, -1]  # [head, d_model]
    if normed:
        last = pb.run(model, IDS[:1], taps=[Port("resid_out", 1)])[Port("resid_out", 1)][0, -1]
        out = (out - out.mean(-1, keepdim=True)) * toy.ln_f.weight / (last.var(unbiased=False) + toy.ln_f.eps).sqrt()
    assert close(found["score"][1] if "score" in found else found.values[1], out @ row)

"""Decoders: against plain decoding and transformers' own beams, on one prompt of 16 tokens and 16 new ones.

"contrastive" is contrastive search of four candidates against plain cached decoding of a batch of four. "superposed" is three drafts in
one stream against greedy decoding, step by step, and with the run that scores the drafts, which decides nothing. "beam" is ours of
four beams, and "diverse beam" six beams in three groups, against transformers' beam search of as many. "speculative" is greedy text of a
model whose upper layers write nothing, with its lowest layer as the draft, which then always agrees: 16 layers against one, against
plain decoding. "knn" is one look for 1,024 neighbours among a million keys of 768 numbers, twelve signals of stories260K side by side on
three texts of ../shared, by FAISS in 1,024 cells of 64 principal components, of which 32 are looked into, with the distances of the whole keys, against one step of the model; recall is
of the 1,024 that a search of all keys finds, for 64 states of texts that are not in the store. Both sides write the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import patchbay as pb
from bench.clock import compare
from bench.report import Row, timed
from bench.shapes import SHAPES, SHARED, checkpoints, prompts, save_shapes
from patchbay.decode import superposed as method
from patchbay.decode._loop import asked
from patchbay.decode._neighbours import Store, search_of
from patchbay.decode.superposed import Stream, _batch

PARTS = ("contrastive", "superposed", "beam", "speculative", "knn")
NEW_TOKENS, KEYS, INDEX = 16, 1_000_000, "faiss('PCA64,IVF1024,Flat', 12)"
TARGETS = {"contrastive": 1.15, "superposed": 1.2, "beam": 1.0, "speculative": 1.0, "knn": 0.1}
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    for name, path in save_shapes(folder, dtype).items():
        model = pb.load(path, device=device, dtype=dtype)
        model.hf.generation_config.eos_token_id = None  # both sides make all the tokens
        for part in (one for one in parts if one != "speculative" and (one != "knn" or name == "gpt2-small")):
            yield from {"contrastive": _contrastive, "superposed": _superposed, "beam": _beam, "knn": _knn}[part](
                name, model, device, seconds
            )
        del model
    if "speculative" in parts:
        yield from _speculative(device, dtype, seconds)


def _plain(model: pb.Model, ids: torch.Tensor, **options: Any) -> Any:
    given = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    return model.hf.generate(ids, attention_mask=torch.ones_like(ids), **given)


def _contrastive(name: str, model: pb.Model, device: str, seconds: float) -> Iterator[Row]:
    ids = prompts(1, 16, model.vocab_size, device)
    found = compare(
        lambda: _plain(model, ids.repeat(4, 1)),
        lambda: pb.decode.contrastive_search(model, ids, k=4, max_new_tokens=NEW_TOKENS),
        seconds=seconds, least=3, warm=1,
    )  # fmt: skip
    yield timed("contrastive search (k=4)", name, "1 x 16", found, TARGETS["contrastive"])


def _superposed(name: str, model: pb.Model, device: str, seconds: float) -> Iterator[Row]:
    ids = prompts(1, 16, model.vocab_size, device)

    def steps() -> Any:
        call = asked(model, ids, NEW_TOKENS, [])
        return _batch(call, [0], [Stream(call.prompts[0])], None, 3, 0.0, 0.06)

    for what, ours, target in (
        ("its steps", steps, TARGETS["superposed"]),
        ("with its scoring", lambda: method(model, ids, drafts=3, max_new_tokens=NEW_TOKENS), None),
    ):
        found = compare(lambda: _plain(model, ids), ours, seconds=seconds, least=3, warm=1)
        yield timed(f"superposed, three drafts ({what})", name, "1 x 16", found, target)


def _beam(name: str, model: pb.Model, device: str, seconds: float) -> Iterator[Row]:
    ids = prompts(1, 16, model.vocab_size, device)
    for what, beams, ours in (
        ("beam (4)", 4, lambda: pb.decode.beam(model, ids, beams=4, max_new_tokens=NEW_TOKENS)),
        ("diverse beam (6 in 3 groups)", 6, lambda: pb.decode.diverse_beam(model, ids, beams=6, groups=3, max_new_tokens=NEW_TOKENS)),
    ):  # fmt: skip
        found = compare(lambda n=beams: _plain(model, ids, num_beams=n), ours, seconds=seconds, least=3, warm=1)
        yield timed(what, name, "1 x 16", found, TARGETS["beam"])


def _speculative(device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """A draft of one layer, and the same with fifteen more that write nothing."""
    torch.manual_seed(0)
    made = []
    for n in (16, 1):
        options = {**SHAPES["llama-small"][1], "num_hidden_layers": n, "vocab_size": 4096}
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options), dtype=dtype).to(device)
        hf.generation_config.eos_token_id = None
        made.append(hf)
    whole, one = made
    one.load_state_dict({name: value for name, value in whole.state_dict().items() if name in one.state_dict()})
    with torch.no_grad():
        for layer in whole.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model, draft = pb.load(whole), pb.load(one)
    ids = prompts(1, 16, model.vocab_size, device)
    told = pb.decode.speculative(model, draft, ids, max_new_tokens=NEW_TOKENS)
    assert told["tokens"][0, 0].tolist() == _plain(model, ids)[0, 16:].tolist()
    found = compare(
        lambda: _plain(model, ids),
        lambda: pb.decode.speculative(model, draft, ids, max_new_tokens=NEW_TOKENS),
        seconds=seconds, least=3, warm=1,
    )  # fmt: skip
    note = f"{int(told['calls'])} passes for {NEW_TOKENS} tokens, {float(told['speedup']):.2f} times foretold by bytes"
    yield timed("speculative (16 layers, draft of one)", "llama form", "1 x 16", found, TARGETS["speculative"], note)


def _knn(name: str, model: pb.Model, device: str, seconds: float) -> Iterator[Row]:
    if (found := _states()) is None:
        return
    keys, queries = found
    store = Store(keys, torch.zeros(KEYS, dtype=torch.long), pb.Port("final_norm"), [], torch.empty(0, 2))
    near, exact = store.nearest(queries, 1024, INDEX)[1], search_of(keys, "exact")(queries, 1024)
    recall = sum(len(set(a) & set(b)) for a, b in zip(near.tolist(), exact.tolist(), strict=True)) / exact.numel()
    query, ids = queries[:1], prompts(1, 16, model.vocab_size, device)
    with torch.no_grad():
        cache = model.hf(ids, use_cache=True).past_key_values

        def step() -> Any:
            out = model.hf(ids[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)
            return out

        timing = compare(step, lambda: store.nearest(query, 1024, INDEX), seconds=seconds)
    what = f"look-up among {KEYS:,} keys ({INDEX})"
    yield timed(what, name, "1 x 1", timing, TARGETS["knn"], f"recall {recall:.3f} of 1,024")


def _states() -> tuple[torch.Tensor, torch.Tensor] | None:
    """KEYS states [key, 768] of stories260K and 64 of texts that are none of theirs, or nothing where the checkpoint is not at hand."""
    path = checkpoints().get("stories260K")
    if path is None:
        return None
    model = pb.load(path)
    texts = [
        SHARED / "data" / one for one in ("tinystories_train_1000.jsonl", "tinyshakespeare.txt", "wikitext2_valid.txt")
    ]
    ids = [
        token
        for text in texts
        for line in text.read_text(encoding="utf-8").split("\n\n")
        for token in model.tokenizer(line)["input_ids"]
    ]
    rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    taps = [f"L{layer}.{signal}" for signal in ("mlp.in", "resid_out") for layer in range(5)] + [
        "L3.attn.out",
        "L4.attn.out",
    ]
    keys, at, queries = torch.empty(KEYS, 768), 0, torch.empty(0)
    for some in rows.split(64):
        trace = pb.run(model, some, taps=taps, logits="last")
        seen = torch.cat([trace[tap] for tap in taps], -1)  # [row, position, 768]
        if at == KEYS:
            queries = seen[:, 100].clone()
            break
        flat = seen.flatten(0, 1)[: KEYS - at]
        keys[at : at + len(flat)] = flat
        at += len(flat)
    if len(queries) < 64:
        print(f"{len(ids)} tokens are too few for {KEYS} keys: the row is left out")
        return None
    return keys, queries[:64]

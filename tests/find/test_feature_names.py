"""Feature names: planted predicates and their exceptions are found, F1 is counted by hand on texts that did not choose, chance is told as chance."""

from __future__ import annotations

import copy
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find._predicates import Tokens, best, f1
from patchbay.find.feature_names import _half, _named, feature_names
from patchbay.tiny import planted, twins
from tests import given
from tests.features.given import dictionary
from tests.tolerance import close


def random_texts(n: int, length: int = 12, vocab: int = 20, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 3 + vocab) for _ in range(length)] for _ in range(n)]


def hand_wired(words: list[int]) -> Any:
    """A GPT-2 whose neuron L0.N0 fires on some tokens, but not in the first place: one dimension a token and one for the first position."""
    hf = copy.deepcopy(twins.twin("gpt2"))
    d, block = hf.config.n_embd, hf.transformer.h[0]
    with torch.no_grad():
        hf.transformer.wte.weight.zero_()
        hf.transformer.wpe.weight.zero_()
        hf.transformer.wte.weight[:24, :24] = torch.eye(24)
        hf.transformer.wpe.weight[0, 24] = 1.0
        hf.transformer.wpe.weight[1:, 25] = 1.0  # so that all streams have one length
        block.attn.c_proj.weight.zero_()
        block.attn.c_proj.bias.zero_()
        block.ln_2.weight.fill_(1.0)
        block.ln_2.bias.zero_()
        size = (1 - 2 / d) / (
            2 / d * (1 - 2 / d) ** 2 + (1 - 2 / d) * (2 / d) ** 2
        ) ** 0.5  # what a one is after the norm
        block.mlp.c_fc.weight[:, 0] = 0.0
        block.mlp.c_fc.weight[words, 0] = 8.0 / size
        block.mlp.c_fc.weight[24, 0] = -16.0 / size
        block.mlp.c_fc.bias[0] = -1.0
    return hf


def test_planted() -> None:
    """A neuron wired to fire on three tokens but not in the first place: predicate and exception are found, and hold on the other half of the texts;
    firing that is moved along the texts has no such name."""
    model = pb.load(hand_wired([5, 7, 9]))
    texts = random_texts(60, length=6)
    result = feature_names(model, texts, ["L0.N0"], draws=9)
    row = result.tables["predicates"][0]
    assert "token in {5, 7, 9}" in row["predicate"]
    assert "and position >= 1" in row["predicate"] or "and not position < 1" in row["predicate"]
    assert float(result.values[0]) == 1.0
    assert float(result["base"][0]) < 0.4
    assert float(result["null"].max()) < 0.6
    assert float(result["p"][0]) == pytest.approx(0.1)


def test_planted_relation() -> None:
    """In words, of a model with a tokenizer; contexts and the tokens that it writes are the planted ones."""
    built = planted.relation_neuron(seed=1)
    model = pb.load(built.model, built.tokenizer)
    neuron = built.truth["neurons"][" has"]
    result = feature_names(model, built.truth["prompts"] * 2, [neuron], draws=1)
    assert float(result.values[0]) == 1.0
    rows = result.tables["contexts"]
    fired = {row["tokens"][row["at"]] for row in rows if row["value"] > rows[0]["value"] / 2}
    assert fired == {" has"}
    months = {model.decode([i]) for i in built.truth["answer_ids"][" has"]}
    assert set(result.tables["promotes"][0]["most"][:7]) == months


def test_predicates_and_their_exceptions_are_found() -> None:
    """Each kind by itself, on tokens alone: sets, what stood before, repeats, places, classes, patterns, and two joined; the shortest is taken."""
    rng = random.Random(0)
    words = [" cat", " dog", " running", " sitting", " Paul", "7", ".", " bird"]
    texts = [[rng.randrange(8) for _ in range(12)] for _ in range(40)]
    tokens = Tokens(texts, lambda i: words[i])
    everywhere = torch.ones(len(tokens), dtype=torch.bool)
    planted_ones = {
        "token in {' cat', '.'}": torch.isin(tokens.ids, torch.tensor([0, 6])),
        "previous token in {' bird'}": tokens.previous == 7,
        "the token came before": tokens.repeats,
        "position < 4": tokens.position < 4,
        "token in {'7'} and not previous token in {' Paul'}": (tokens.ids == 5) & (tokens.previous != 4),
    }
    for said, fires in planted_ones.items():
        found = best(tokens, fires, everywhere)
        assert torch.equal(found.mask, fires), said
        assert found.length <= 2
    ing = torch.isin(tokens.ids, torch.tensor([2, 3]))
    assert best(tokens, ing, everywhere).length == 1  # /ing$/ and not the two words
    noisy = torch.isin(tokens.ids, torch.tensor([0])) ^ (
        torch.rand(len(tokens), generator=torch.Generator().manual_seed(0)) < 0.02
    )
    assert best(tokens, noisy, everywhere).text == "token in {' cat'}"


def test_reference() -> None:
    """F1 on the other half, base rate and density, by plain loops over Hugging Face's own activations."""
    hf = twins.twin("gpt2")
    model, texts = pb.load(hf), random_texts(16, vocab=8, seed=1)
    result = feature_names(model, texts, ["L1.N5"], draws=2, seed=3, batch_size=5)
    acts = []
    hook = hf.transformer.h[1].mlp.act.register_forward_hook(lambda _, args, out: acts.append(out[0, :, 5]))
    with torch.no_grad():
        for ids in texts:
            hf(torch.tensor([ids]))
    hook.remove()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()
    chosen, other = order[:8], order[8:]
    bar = 0.5 * max(float(acts[i].max()) for i in chosen)
    said = result.tables["predicates"][0]["predicate"]
    tokens = Tokens(texts, None)
    mask = best(tokens, torch.cat(acts) > bar, _half(texts, 3)).mask.split([len(ids) for ids in texts])
    hits = false = missed = fired = seen = 0
    for i in other:
        for at in range(len(texts[i])):
            is_on, holds = float(acts[i][at]) > bar, bool(mask[i][at])
            hits += is_on and holds
            false += holds and not is_on
            missed += is_on and not holds
            fired += is_on
            seen += 1
    assert said
    assert close(result.values[0], 2 * hits / (2 * hits + false + missed))
    assert close(result["base"][0], 2 * fired / (fired + seen))
    assert sum(len(texts[i]) for i in chosen) == int(_half(texts, 3).sum())
    first = max((float(acts[i][at]), i, at) for i in range(16) for at in range(len(texts[i])))
    row = result.tables["contexts"][0]
    assert (row["text"], row["position"]) == first[1:]
    assert close(row["values"], acts[first[1]][max(0, first[2] - 10) : first[2] + 5])


def test_null() -> None:
    """Firing that nothing explains: F1 is where that of moved firing is, above the base rate of nothing, and p is spread."""
    texts = random_texts(20, vocab=15, seed=5)
    tokens, chooses = Tokens(texts, None), _half(texts, 0)
    draw, found = torch.Generator().manual_seed(0), []
    for i in range(8):
        values = (torch.rand(len(tokens), generator=draw) < 0.15).float()
        row = _named(tokens, values, pb.Part(0, "feature", 0), chooses, 3, i)
        found.append((row["f1"], sum(row["null"]) / 3, sum(one >= row["f1"] for one in row["null"])))
    gap = [own - null for own, null, _ in found]
    assert abs(sum(gap) / len(gap)) < 0.1
    assert len({at for _, _, at in found}) >= 2
    silent = feature_names(given.lent("gpt2"), texts, ["L0.N0"], draws=1)
    assert silent.values.shape == (1,)


def test_features_that_never_fire_have_no_name() -> None:
    model = given.lent("gpt2")
    it = dictionary(model, "L1.resid_out", b_enc=torch.full((24,), -1e6))
    result = feature_names(model.with_dictionaries(it), random_texts(6), ["L1.F3"], draws=1)
    assert result.values.isnan().all()
    assert "L1.F3 fire nowhere" in result.notes[-1]
    assert float(result["density"][0]) == 0.0


def test_what_parts_say_and_who_is_near() -> None:
    """The effect on the logits is the decoder's row through gain and centred unembedding; the nearest is the planted twin."""
    model = given.lent("llama")
    it = dictionary(model, "L1.resid_out")
    rows = it.W_dec.clone()
    rows[7] = 2.0 * rows[3]
    view = model.with_dictionaries(pb.Dictionary(it.W_enc, rows, it.b_enc, it.b_dec, layer=1))
    result = feature_names(view, random_texts(8), ["L1.F3"], draws=1)
    row = result.tables["promotes"][0]
    gain, unembed = model.hf.model.norm.weight.detach(), model.hf.lm_head.weight.detach()
    effect = [float((rows[3] * gain) @ (unembed[i] - unembed.mean(0))) for i in range(len(unembed))]
    order = sorted(range(len(effect)), key=lambda i: -effect[i])
    assert row["most"] == [str(i) for i in order[:10]]
    assert close(row["most_values"], [effect[i] for i in order[:10]], of=1.0)
    assert row["least"] == [str(i) for i in order[::-1][:10]]
    assert row["near"][0]["part"] == "L1.F7"
    assert close(row["near"][0]["cosine"], 1.0)
    assert sum(row["count"]) == len(effect)


def test_dashboards_are_written_as_neuronpedia_reads_them(tmp_path: Any) -> None:
    model = given.lent("gpt2")
    view = model.with_dictionaries(dictionary(model, "L1.resid_out"))
    result = feature_names(view, random_texts(8), ["L1.F3", "L1.F5"], draws=1)
    held = json.loads(result.save_dashboards(tmp_path / "batch.json").read_text())
    assert [row["feature_index"] for row in held["features"]] == [3, 5]
    for row, density in zip(held["features"], result["density"].tolist(), strict=True):
        assert row["frac_nonzero"] == density
        for name in ("freq", "logits"):
            assert len(row[f"{name}_hist_data_bar_values"]) == len(row[f"{name}_hist_data_bar_heights"])
        assert sum(row["freq_hist_data_bar_heights"]) == round(density * 96)
        assert row["pos_values"] == sorted(row["pos_values"], reverse=True)
        for context in row["activations"]:
            assert len(context["tokens"]) == len(context["values"])
            assert context["bin_min"] <= context["values"][context["qualifying_token_index"]] <= context["bin_max"]
    both = feature_names(view, random_texts(4), ["L1.F3", "L0.N5"], draws=1)
    with pytest.raises(pb.PatchbayError, match="of one layer and kind"):
        both.save_dashboards(tmp_path / "other.json")
    with pytest.raises(pb.PatchbayError, match="no contexts of features"):
        pb.Result(torch.ones(2, 4)).save_dashboards(tmp_path / "none.json")


@pytest.fixture
def asked() -> Iterator[tuple[str, list[Any]]]:
    """An address that answers as OpenAI's protocol says, and what it was sent."""
    seen: list[Any] = []

    class Answers(BaseHTTPRequestHandler):
        def _say(self, held: Any) -> None:
            body = json.dumps(held).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._say({"data": [{"id": "writer"}]})

        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._say({"choices": [{"message": {"content": " It fires on sevens. "}}]})

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_is_asked_only_where_one_is_given(
    asked: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, seen = asked
    model, texts = given.lent("gpt2"), random_texts(4)
    result = feature_names(model, texts, ["L0.N3"], draws=1, endpoint=endpoint)
    row = result.tables["asked"][0]
    assert (row["part"], row["said"], row["model"], row["endpoint"]) == (
        "L0.N3",
        "It fires on sevens.",
        "writer",
        endpoint,
    )
    assert seen[0]["messages"][0]["content"] == row["prompt"]
    assert "<<" in row["prompt"]
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("nobody is asked"))
    assert "asked" not in feature_names(model, texts, ["L0.N3"], draws=1).tables
    with pytest.raises(pb.PatchbayError, match="not on this machine"):
        feature_names(model, texts, ["L0.N3"], draws=1, endpoint="https://example.com/v1")
    with pytest.raises(pb.PatchbayError, match=r"an address such as http://127.0.0.1"):
        feature_names(model, texts, ["L0.N3"], draws=1, endpoint="file:///etc/passwd")


def test_bad_input() -> None:
    model = given.lent("gpt2")
    with pytest.raises(pb.PatchbayError, match="no feature and no neuron"):
        feature_names(model, random_texts(4), ["L0.H1"])
    with pytest.raises(pb.PatchbayError, match="and 1 was given"):
        feature_names(model, random_texts(1), ["L0.N1"])
    with pytest.raises(pb.PatchbayError, match="draws=0"):
        feature_names(model, random_texts(4), ["L0.N1"], draws=0)
    assert f1(torch.tensor([True, True, False]), torch.tensor([True, False, True])) == 0.5

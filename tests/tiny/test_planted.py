"""The planted models do what their truth says, seen through plain Hugging Face, and the null model does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from patchbay.tiny import planted
from patchbay.tiny.planted import Planted
from tests.shares import WHOLE, by_turns
from tests.tolerance import close

FORMS = ["gpt2", "llama"]
BUILDERS: dict[str, Callable[..., Planted]] = {
    name: getattr(planted, name) for name in planted.__all__ if name not in ("Planted", "null", "routed_expert")
}
ANSWERING = ["induction", "copy", "successor", "inhibition", "relation_neuron", "routed_expert"]
CASES = [*((name, {"form": form}) for name in [*BUILDERS, "null"] for form in FORMS), ("routed_expert", {})]


# ---- plain Hugging Face, and parts cut out by hand -----------------------------------------------------------------
def parse(part: str) -> tuple[int, int]:
    layer, index = re.fullmatch(r"L(\d+)\.[HNE](\d+)", part).groups()  # type: ignore[union-attr]
    return int(layer), int(index)


def attn_of(model: nn.Module, layer: int) -> nn.Module:
    return model.transformer.h[layer].attn if hasattr(model, "transformer") else model.model.layers[layer].self_attn


def layer_of(model: nn.Module, layer: int) -> nn.Module:
    return model.transformer.h[layer] if hasattr(model, "transformer") else model.model.layers[layer]


def down_of(model: nn.Module, layer: int) -> nn.Module:
    mlp = layer_of(model, layer).mlp
    return mlp.c_proj if hasattr(mlp, "c_proj") else mlp.down_proj


def head_weights(model: nn.Module, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [d_model, d_head] and o [d_head, d_model], cut out without the canvas."""
    attn, config = attn_of(model, layer), model.config
    d_head = config.hidden_size // config.num_attention_heads
    rows = slice(head * d_head, (head + 1) * d_head)
    if hasattr(attn, "c_attn"):
        q, k, v = (weight[:, rows] for weight in attn.c_attn.weight.chunk(3, dim=1))
        return q.detach(), k.detach(), v.detach(), attn.c_proj.weight[rows].detach()
    group = head * config.num_key_value_heads // config.num_attention_heads
    shared = slice(group * d_head, (group + 1) * d_head)
    q, k, v = attn.q_proj.weight[rows].T, attn.k_proj.weight[shared].T, attn.v_proj.weight[shared].T
    return q.detach(), k.detach(), v.detach(), attn.o_proj.weight[:, rows].T.detach()


@contextmanager
def ablated(model: nn.Module, part: str) -> Iterator[None]:
    """The head's z, or the neuron's activation, set to zero."""
    layer, index = parse(part)
    head = ".H" in part
    attn = attn_of(model, layer)
    module = getattr(attn, "c_proj", getattr(attn, "o_proj", None)) if head else down_of(model, layer)
    d_head = model.config.hidden_size // model.config.num_attention_heads
    cut = slice(index * d_head, (index + 1) * d_head) if head else slice(index, index + 1)

    def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        value = inputs[0].clone()
        value[..., cut] = 0.0
        return (value,)

    hook = module.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        hook.remove()


def ids_of(lent: Planted, text: str) -> list[int]:
    return lent.tokenizer.encode(text)


@torch.no_grad()
def last_logits(lent: Planted, prompt: str) -> Tensor:
    return lent.model(torch.tensor([ids_of(lent, prompt)])).logits[0, -1]


def answers(lent: Planted) -> list[str]:
    """The model's own next words, one per prompt of the truth."""
    return [lent.tokenizer.decode([last_logits(lent, prompt).argmax().item()]) for prompt in lent.truth["prompts"]]


def answer_logits(lent: Planted, key: str = "answers") -> Tensor:
    pairs = zip(lent.truth["prompts"], lent.truth[key], strict=True)
    return torch.stack([last_logits(lent, prompt)[ids_of(lent, word)[0]] for prompt, word in pairs])


def share_right(lent: Planted) -> float:
    right = [mine == given for mine, given in zip(answers(lent), lent.truth["answers"], strict=True)]
    return sum(right) / len(right)


@torch.no_grad()
def patterns(lent: Planted, token_ids: Tensor) -> Tensor:
    """[layer, prompt, head, query, key]"""
    lent.model.set_attn_implementation("eager")
    return torch.stack(lent.model(token_ids, output_attentions=True).attentions)


def repeated(n_prompts: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(61, generator=generator)[:length] + 3 for _ in range(n_prompts)])
    return torch.cat([first, first], dim=1)  # [prompt, 2 * length]


# ---- what holds for all --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "options"), by_turns(CASES, of=2))
def test_same_seed_same_model_and_another_seed_another(name: str, options: dict[str, str]) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (getattr(planted, name)(seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights, same, different = (lent.model.state_dict() for lent in (first, again, other))
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    assert not any(torch.equal(weights[key], different[key]) for key in weights if key.endswith("c_attn.weight"))
    assert str(first.truth) == str(again.truth)
    assert first.truth["mechanism"] == name
    assert first.truth["seed"] == 3
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())
    assert not first.model.training
    assert first.model.config._attn_implementation == "sdpa"
    with pytest.raises(TypeError):
        first.truth["seed"] = 5  # type: ignore[index]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_table_names_the_truth_keys(name: str, options: dict[str, str]) -> None:
    row, listed = "", []
    for line in planted.__doc__.splitlines():  # type: ignore[union-attr]
        if line.startswith("|"):
            function, _, keys = (cell.strip() for cell in line.strip("|").split("|"))
            row = function or row
            listed += keys.split() if row == name else []
    if "(C)" in listed:
        listed = [
            *(key for key in listed if key != "(C)"),
            *["copy_strength", "logit", "attention", "prompts", "answers"],
        ]
    truth = getattr(planted, name)(**options).truth
    assert sorted(listed) == sorted(set(truth) - {"mechanism", "form", "seed"})


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in ANSWERING])
def test_answers_and_logits_over_seeds(name: str, options: dict[str, str]) -> None:
    for seed in range(3 if WHOLE else 1):
        lent = getattr(planted, name)(seed=seed, **options)
        assert answers(lent) == lent.truth["answers"]
        relative = answer_logits(lent) / lent.truth["logit"] - 1.0
        assert relative.abs().max() < 0.08
        assert relative.mean().abs() < 0.02


def test_tokenizer_round_trip() -> None:
    lent = planted.null()
    text = " then Mary and John has a book.\n the one, two:<bos> gave"
    ids = ids_of(lent, text)
    assert lent.tokenizer.decode(ids) == text
    assert lent.tokenizer.unk_token_id not in ids
    words = lent.tokenizer.convert_ids_to_tokens(list(range(len(lent.tokenizer))))
    assert len(words) == lent.model.config.vocab_size == 64
    assert all(ids_of(lent, word) == [i] for i, word in enumerate(words))
    assert ids_of(lent, " zebra") == [lent.tokenizer.unk_token_id]


# ---- one mechanism after the other ---------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [5, 20, 50])
@pytest.mark.parametrize("form", FORMS)
def test_induction(form: str, length: int) -> None:
    lent = planted.induction(form=form, seed=1)
    tokens = repeated(6, length, seed=length)
    attention = patterns(lent, tokens)
    looks_back = attention.diagonal(-1, -2, -1).mean(dim=(1, 3))  # [layer, head]
    repeats = attention.diagonal(1 - length, -2, -1)[..., 1:].mean(dim=(1, 3))  # queries `length` and later
    for scores, part in ((looks_back, "previous_token"), (repeats, "induction")):
        layer, head = parse(lent.truth[part])
        assert scores[layer, head] > 0.999
        scores[layer, head] = 0.0
        assert scores.max() < 0.5
    assert all(paid > 0.999 for paid in lent.truth["attention"].values())
    predicted = lent.model(tokens).logits.argmax(-1)[:, length - 1 : -1]
    assert (predicted[:, 1:] == tokens[:, length + 1 :]).all()
    for part in ("previous_token", "induction"):
        with ablated(lent.model, lent.truth[part]):
            predicted = lent.model(tokens).logits.argmax(-1)[:, length:-1]
            assert (predicted == tokens[:, length + 1 :]).float().mean() < 0.1


@pytest.mark.parametrize("form", FORMS)
def test_copy(form: str) -> None:
    lent = planted.copy(form=form, seed=1)
    layer, head = parse(lent.truth["copy"])
    assert lent.truth["attention"][lent.truth["copy"]] > 0.999
    tokens = torch.tensor([ids_of(lent, prompt) for prompt in lent.truth["prompts"]])
    target = torch.isin(tokens, torch.tensor(lent.truth["marked_ids"])).float()  # [prompt, key]
    attention = patterns(lent, tokens)[:, :, :, -1]  # [layer, prompt, head, key]
    paid = (attention * target[:, None]).sum(-1).mean(1)  # [layer, head]
    assert paid[layer, head] > 0.999
    paid[layer, head] = 0.0
    assert paid.max() < 0.5
    embedding, unembedding = lent.model.get_input_embeddings().weight, lent.model.get_output_embeddings().weight
    _, _, v, o = head_weights(lent.model, layer, head)
    assert ((embedding @ v @ o @ unembedding.T).argmax(-1) == torch.arange(64)).all()
    generated = lent.model.generate(tokens, max_new_tokens=2, do_sample=False)[:, -2:]  # goes on with the marked word
    assert (generated[:, 0] == generated[:, 1]).all()
    assert torch.isin(generated, torch.tensor(lent.truth["marked_ids"])).all()
    with ablated(lent.model, lent.truth["copy"]):
        assert share_right(lent) == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_successor(form: str) -> None:
    lent = planted.successor(form=form, seed=1)
    layer, head = parse(lent.truth["successor"])
    after = lent.truth["successor_of"]
    assert sorted(after) == sorted(after.values())
    assert len(after) == 29
    words = lent.tokenizer.convert_ids_to_tokens
    assert words(after[ids_of(lent, " two")[0]]) == " three"
    assert words(after[ids_of(lent, " Sunday")[0]]) == " Monday"
    embedding, unembedding = lent.model.get_input_embeddings().weight, lent.model.get_output_embeddings().weight

    def successor_score(layer: int, head: int) -> float:
        _, _, v, o = head_weights(lent.model, layer, head)
        best = (embedding @ v @ o @ unembedding.T).argmax(-1)
        return sum(best[word].item() == follower for word, follower in after.items()) / len(after)

    scores = {(i, j): successor_score(i, j) for i in range(2) for j in range(4)}
    assert scores.pop((layer, head)) == 1.0
    assert max(scores.values()) < 0.25
    tokens = torch.tensor([list(after)[:20]])
    assert patterns(lent, tokens)[layer, 0, head].diagonal().min() > 0.999
    assert lent.model(tokens).logits[0].argmax(-1).tolist() == list(after.values())[:20]
    with ablated(lent.model, lent.truth["successor"]):
        assert share_right(lent) == 0.0


def component_scores(lent: Planted, distance: int = 0) -> tuple[Tensor, Tensor, Tensor, float]:
    """Every writer component's composition score, the null's scores, the singular values, the whole heads' score."""
    *_, v, o = head_weights(lent.model, *parse(lent.truth["writer"]))
    _, singular, directions = torch.linalg.svd(v.double() @ o.double())
    n = v.shape[1]
    query, key, value, output = (w.double() for w in head_weights(lent.model, *parse(lent.truth["reader"])))
    if lent.truth["form"] == "llama" and distance:  # turn W_Q by the distance, as the model does
        rotary = lent.model.model.rotary_emb
        cos, sin = (table.double() for table in rotary(query.float(), torch.tensor([[distance]])))
        query = apply_rotary_pos_emb(query[None, None], query[None, None], cos, sin)[0][0, 0]
    inner = {"query": query @ key.T, "key": key @ query.T, "value": value @ output}[lent.truth["composition"]]
    generator = torch.Generator().manual_seed(0)
    rotated = torch.randn(
        2000, len(inner), generator=generator
    ).double()  # a rotation sends v_i to a random unit vector
    rotated = rotated - rotated.mean(1, keepdim=True) if lent.truth["form"] == "gpt2" else rotated
    null = ((rotated / rotated.norm(dim=1, keepdim=True)) @ inner).norm(dim=1) / inner.norm()
    whole = (v.double() @ o.double() @ inner).norm() / ((v.double() @ o.double()).norm() * inner.norm())
    return (directions[:n] @ inner).norm(dim=1) / inner.norm(), null, singular[:n], whole.item()


@pytest.mark.parametrize("composition", ["query", "key", "value"])
@pytest.mark.parametrize("form", FORMS)
def test_channel(form: str, composition: str) -> None:
    for strength, rank, component, least_z in ((0.2, 1, 3, 5.0), (0.5, 1, 0, 40.0), (0.3, 3, 5, 15.0)):
        lent = planted.channel(
            form=form, composition=composition, strength=strength, rank=rank, component=component, seed=2
        )
        scores, null, singular, whole = component_scores(lent)
        place = list(range(component, component + rank))
        assert lent.truth["components"] == place
        assert close(scores[place], torch.full((rank,), strength).double())
        assert close(singular.float(), lent.truth["singular_values"])
        z = (scores - null.mean()) / null.std()
        assert z[place].min() > least_z
        rest = torch.cat([z[:component], z[component + rank :]])
        assert rest.max() < 4.5
        identity = (singular.square() * scores.square()).sum() / singular.square().sum()
        assert close(whole**2, identity.item(), dtype=torch.float64, of=1.0)
        if form == "llama" and composition == "query":
            far, *_ = component_scores(lent, distance=7)
            assert close(far[place], scores[place])


@pytest.mark.parametrize("form", FORMS)
def test_channel_readers_and_directions(form: str) -> None:
    for composition in ("query", "key", "value"):
        lent = planted.channel(form=form, composition=composition, rank=2, strength=0.4, seed=5)
        shared = form == "llama" and composition != "query"
        assert len(lent.truth["readers"]) == (2 if shared else 1)
        assert lent.truth["reader"] in lent.truth["readers"]
        strong = []
        for head in range(4):
            q, k, v, o = head_weights(lent.model, 1, head)
            inner = {"query": q @ k.T, "key": k @ q.T, "value": v @ o}[composition]
            score = (lent.truth["directions"] @ inner).norm(dim=1) / inner.norm()
            if score.min() > 0.39:
                strong.append(f"L1.H{head}")
        assert strong == sorted(lent.truth["readers"])


@pytest.mark.parametrize("form", FORMS)
def test_inhibition(form: str) -> None:
    lent = planted.inhibition(form=form, seed=1)
    layer, mover = parse(lent.truth["mover"])
    to_the_mentioned_twice = []
    for prompt, word, wrong in zip(*(lent.truth[key] for key in ("prompts", "answers", "wrong")), strict=True):
        tokens = ids_of(lent, prompt)
        target, inhibited = ids_of(lent, word)[0], ids_of(lent, wrong)[0]
        assert tokens.count(target) == 1
        assert tokens.count(inhibited) == 2
        pattern = patterns(lent, torch.tensor([tokens]))
        paid = pattern[layer, 0, mover, -1]
        assert paid[tokens.index(target)] > 0.99
        again = len(tokens) - 1 - tokens[::-1].index(inhibited)  # the duplicate head looks behind the first mention
        duplicate_layer, duplicate = parse(lent.truth["duplicate"])
        assert pattern[duplicate_layer, 0, duplicate, again, tokens.index(inhibited) + 1] > 0.99
        with ablated(lent.model, lent.truth["inhibition"]):
            paid = patterns(lent, torch.tensor([tokens]))[layer, 0, mover, -1]
            twice = torch.tensor([tokens.count(token) == 2 and token in lent.truth["entity_ids"] for token in tokens])
            to_the_mentioned_twice.append(paid[twice].sum())
    assert torch.stack(to_the_mentioned_twice).mean() > 0.6
    assert share_right(lent) == 1.0
    difference = answer_logits(lent) - answer_logits(lent, "wrong")
    for part, most_right in (("previous_token", 0.6), ("duplicate", 0.6), ("inhibition", 0.2), ("mover", 0.2)):
        with ablated(lent.model, lent.truth[part]):
            fall = difference - (answer_logits(lent) - answer_logits(lent, "wrong"))
            assert share_right(lent) <= most_right
            assert fall.mean() > 4.0
            assert part not in ("inhibition", "mover") or fall.min() > 5.0
    noise = next(f"L2.H{head}" for head in range(4) if f"L2.H{head}" != lent.truth["inhibition"])
    with ablated(lent.model, noise):
        assert share_right(lent) == 1.0


@pytest.mark.parametrize("form", FORMS)
def test_steering(form: str) -> None:
    lent = planted.steering(form=form, seed=1)
    truth, model = lent.truth, lent.model
    token, d_model = truth["token_id"], model.config.hidden_size
    for carried, ids in ((1.0, truth["positive_ids"]), (-1.0, truth["negative_ids"])):
        prompt = torch.tensor([[3, ids[0], ids[1]]])
        for layer in range(len(truth["layers"])):
            for amount in (0.0, 2.0, 8.0, -5.0):
                added = amount * truth["direction"]
                with hooked(layer_of(model, layer), added), torch.no_grad():
                    got = model(prompt).logits[0, -1, token].item()
                square = truth["square_norm"] + 2.0 * amount * carried + amount**2
                expected = truth["strength"] * (carried + amount) * (d_model / square) ** 0.5
                assert abs(got - expected) < 0.01 * abs(expected) + 0.1
    stream = model.get_input_embeddings().weight
    towards = stream[truth["positive_ids"]].mean(0) - stream[truth["negative_ids"]].mean(0)
    assert torch.cosine_similarity(towards, truth["direction"], dim=0) > 0.98


@contextmanager
def hooked(module: nn.Module, added: Tensor) -> Iterator[None]:
    def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])

    hook = module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def activations(lent: Planted, part: str, prompt: str) -> Tensor:
    """[position]"""
    layer, neuron = parse(part)
    kept: list[Tensor] = []
    hook = down_of(lent.model, layer).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    lent.model(torch.tensor([ids_of(lent, prompt)]))
    hook.remove()
    return kept[0][0, :, neuron]


@pytest.mark.parametrize("form", FORMS)
def test_relation_neuron(form: str) -> None:
    lent = planted.relation_neuron(form=form, seed=1)
    truth = lent.truth
    difference = answer_logits(lent) - answer_logits(lent, "wrong")
    for relation, part in truth["neurons"].items():
        layer, neuron = parse(part)
        of_relation = torch.tensor([prompt.endswith(relation) for prompt in truth["prompts"]])
        for prompt in truth["prompts"]:
            acts = activations(lent, part, prompt)
            assert acts[:-1].abs().max() < 0.1
            assert abs(acts[-1] - (truth["activation"] if prompt.endswith(relation) else 0.0)) < 0.8
        weight = down_of(lent.model, layer).weight.detach()
        write = weight[neuron] if form == "gpt2" else weight[:, neuron]
        assert torch.cosine_similarity(write, truth["directions"][relation], dim=0) > 0.9999
        assert abs(write.norm() * truth["activation"] - truth["write_norm"]) < 1e-3
        raised = lent.model.get_output_embeddings().weight @ truth["directions"][relation]
        assert sorted(raised.topk(7).indices.tolist()) == sorted(truth["answer_ids"][relation])
        with ablated(lent.model, part):
            left = answer_logits(lent) - answer_logits(lent, "wrong")
        assert difference[of_relation].min() > 7.0
        assert left[of_relation].abs().max() < 2.0
        assert (left - difference)[~of_relation].abs().max() < 0.3
    with ablated(lent.model, truth["subject_head"]):
        assert share_right(lent) < 0.5


def test_routed_expert() -> None:
    lent = planted.routed_expert(seed=1)
    truth, model = lent.truth, lent.model
    layer, expert = parse(truth["expert"])
    words = torch.arange(64)[None].T  # one word per prompt
    weights = model(words, output_router_logits=True).router_logits[layer].softmax(-1).detach()  # [word, expert]
    member = torch.isin(words[:, 0], torch.tensor(truth["class_ids"]))
    assert weights[member, expert].min() > 0.999
    assert weights[~member, expert].max() < 1e-4
    assert truth["router_weight"] > 0.999
    assert truth["other_router_weight"] < 0.001
    predicted = model(words).logits[:, -1].argmax(-1)
    assert (predicted[member] == truth["token_id"]).all()
    assert (predicted[~member] == words[~member, 0]).all()
    down = model.model.layers[layer].mlp.experts.down_proj.data
    kept = down[expert].clone()
    down[expert] = 0.0
    assert share_right(lent) == 0.0
    down[expert] = kept
    other = (expert + 1) % len(down)
    down[other] = 0.0
    assert share_right(lent) == 1.0


# ---- nothing in the null model -------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [*FORMS, "mixtral"])
def test_null_has_none_of_it(form: str) -> None:
    lent = planted.null(form=form, seed=1)
    model = lent.model
    tokens = repeated(6, 20, seed=0)
    attention = patterns(lent, tokens)
    assert attention.diagonal(-1, -2, -1).mean(dim=(1, 3)).max() < 0.3
    assert attention.diagonal(-19, -2, -1)[..., 1:].mean(dim=(1, 3)).max() < 0.2
    assert attention.diagonal(0, -2, -1)[..., 5:].mean(dim=(1, 3)).max() < 0.3
    assert (model(tokens).logits.argmax(-1)[:, 20:-1] == tokens[:, 21:]).float().mean() < 0.1
    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    after = planted.successor(form="gpt2").truth["successor_of"]
    for layer in range(2):
        for head in range(4):
            _, _, v, o = head_weights(model, layer, head)
            best = (embedding @ v @ o @ unembedding.T).argmax(-1)
            assert sum(best[word].item() == follower for word, follower in after.items()) / len(after) < 0.2
            assert (best == torch.arange(64)).float().mean() < 0.15
    for name, builder in BUILDERS.items():
        truth = builder(form="gpt2").truth
        if "prompts" in truth:
            pretended = Planted(model, lent.tokenizer, truth)
            assert share_right(pretended) < 0.35, name


@pytest.mark.parametrize("form", FORMS)
def test_null_has_no_channel(form: str) -> None:
    lent = planted.null(form=form, seed=1)
    for composition in ("query", "key", "value"):
        for writer in range(4):
            for reader in (writer, 3 - writer):
                truth = {"writer": f"L0.H{writer}", "reader": f"L1.H{reader}", "composition": composition, "form": form}
                scores, null, *_ = component_scores(Planted(lent.model, lent.tokenizer, truth))
                assert (scores - null.mean()).div(null.std()).max() < 5.0


# ---- bad input -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: planted.induction(form="bert"), "form 'bert' was asked"),
        (lambda: planted.induction(d_model=128), "pass a larger d_model"),
        (lambda: planted.induction(n_positions=500), "n_positions=500 was asked"),
        (lambda: planted.induction(n_layers=1), "needs a layer 1; n_layers=1"),
        (lambda: planted.inhibition(n_layers=2), "needs a layer 2; n_layers=2"),
        (lambda: planted.channel(composition="output"), "'query', 'key' and 'value'"),
        (lambda: planted.channel(rank=4, strength=0.5), "must be below 1"),
        (lambda: planted.channel(rank=2, component=63), "the writer has 0 to 63"),
        (lambda: planted.null(n_heads=3), "must divide by n_heads=3"),
    ],
)
def test_bad_input_is_refused(build: Callable[[], Planted], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        build()

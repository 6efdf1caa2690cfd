"""Tree probe: what one layer carries is read there and no sooner; its formulas as loops; nothing where trees are dealt; trees of Python and back."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse.csgraph
import scipy.stats
import torch
from torch import Tensor

import patchbay as pb
from patchbay.find._dependencies import distances, of_conllu
from patchbay.find._python_trees import of_python
from patchbay.find._trees import EMPTY, Tree, agreement, coded, decoded, nodes, of_brackets
from patchbay.tiny.planted import LOGIT_SCALE, SHARPNESS
from patchbay.tiny.planted_canvas import Canvas
from patchbay.tiny.planted_vocabulary import WORDS, tokenizer
from tests import given
from tests.measure.words import tokenizer as letters
from tests.shared import SHARED
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.tree_probe")
SPOKEN = [i for i, word in enumerate(WORDS) if word.startswith(" ") and word != " the"]


def carrying(codes: Tensor, layer: int, form: Any = "gpt2") -> pb.Model:
    """A model in which each token hears, in `layer`, the code [token, coordinate] of the word before it."""
    canvas = Canvas(form, 0, n_layers=2, d_model=160, n_positions=32)
    n = codes.shape[1]
    own, copied = canvas.take(n, protect=True), canvas.take(n, protect=True)
    words = canvas.take(canvas.n_vocab)
    canvas.embed(words + codes @ own)
    q, k = canvas.offset_maps(1, SHARPNESS)
    canvas.set_head(layer, canvas.pick_head(layer), q=q, k=k, v=own.T, o=4.0 * copied)
    canvas.unembed(LOGIT_SCALE * words)
    return pb.load(canvas.model, tokenizer())


def bracketed(tree: Tree | int, words: Sequence[str]) -> str:
    if isinstance(tree, int):
        return words[tree].strip()
    return f"({tree.label} {' '.join(bracketed(child, words) for child in tree.children)})"


def conllu(words: Sequence[str], heads: Sequence[int], text: str = "") -> str:
    rows = [
        f"{i + 1}\t{word}\t_\t_\t_\t_\t{head + 1}\t_\t_\t_"
        for i, (word, head) in enumerate(zip(words, heads, strict=True))
    ]
    return "\n".join([f"# text = {text}"] * bool(text) + rows)


def test_planted() -> None:
    """Heights, labels and unary labels all follow from the code of the word before: read after the layer that brings it, and no sooner."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(len(WORDS), 3, generator=generator)
    model, texts = carrying(codes, layer=1), []
    for _ in range(48):
        ids = [WORDS.index(","), *(SPOKEN[i] for i in torch.randperm(len(SPOKEN), generator=generator)[:9])]
        z = codes[[ids[0], *ids[:-1]]]
        step = z.diff(dim=0)
        c = [EMPTY, *("AB"[int(x > 0)] for x in step[1:, 1])]
        tree = decoded(step.square().sum(1).tolist(), c, [("U" if x > 0 else EMPTY) for x in z[:, 2]])
        texts.append(bracketed(tree[0] if len(tree) == 1 else Tree("A", tuple(tree)), [WORDS[i] for i in ids]))
    found = pb.find.tree_probe(model, texts, kind="brackets", rank=3, steps=80, draws=2)
    assert found.labels_of("layer") == ["embed", "L0", "L1"]
    assert float(found.values[2]) > 0.7
    assert float(found.values[:2].max()) < 0.55
    assert float(found["null_high"].max()) < 0.5
    assert float(found["random"].max()) < 0.65
    assert float(found["untrained"].max()) < 0.55
    assert float(found["gain_low"][2]) > 0.1
    assert float(found["p"][2]) == pytest.approx(1 / 3)
    assert "NOT above" not in found.notes[0]


@pytest.mark.slow  # as many fits again
@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted_dependencies(form: Any) -> None:
    """A coordinate for every edge makes squared distances those of the tree: all edges are found where a layer brings them."""
    generator, k = torch.Generator().manual_seed(1), 5
    masks = torch.tensor([[float(i >> bit & 1) for bit in range(k)] for i in range(2**k)])
    codes = torch.zeros(len(WORDS), k)
    codes[SPOKEN[: 2**k]] = masks
    texts = []
    for _ in range(40):
        heads = [-1, *(int(torch.randint(i, (1,), generator=generator)) for i in range(1, k + 1))]
        paths = torch.zeros(k + 1, k)
        for word in range(1, k + 1):
            paths[word] = paths[heads[word]]
            paths[word, word - 1] = 1.0
        order = torch.randperm(k + 1, generator=generator).tolist()  # words stand in any order
        moved = [-1 if heads[old] < 0 else order.index(heads[old]) for old in order]
        keys = [WORDS[SPOKEN[int((paths[old] * 2 ** torch.arange(k)).sum())]] for old in order]
        texts.append(conllu(["the"] * (k + 1), moved, "," + "".join(f"{key} the" for key in keys)))
    found = pb.find.tree_probe(carrying(codes, 1, form), texts, kind="conllu", rank=k, steps=100, draws=1)
    assert float(found["uuas"][2]) > 0.9
    assert float(found["spearman"][2]) > 0.9
    assert float(found["uuas"][:2].max()) < 0.65
    assert float(found["null_high"].max()) < 0.65
    assert float(found["untrained"].max()) < 0.65


# --- the formulas as loops ------------------------------------------------------------------------------

LABELS = ["<empty>", "A", "B", "S"]
UNARY = ["<empty>", "U"]


def drawn(n: int, seed: int) -> tuple[list[str], list[Tree], list[list[str]]]:
    """Random trees over random letters, in brackets, and by themselves."""
    generator = torch.Generator().manual_seed(seed)
    texts, trees, words = [], [], []
    while len(texts) < n:
        size = int(torch.randint(3, 7, (1,), generator=generator))
        d = torch.randperm(size - 1, generator=generator).tolist()
        c = [("A", "B", EMPTY)[i] for i in torch.randint(3, (size - 1,), generator=generator)]
        u = [UNARY[i] for i in torch.randint(2, (size,), generator=generator)]
        pieces = decoded(d, c, u)
        tree = pieces[0] if len(pieces) == 1 and isinstance(pieces[0], Tree) else Tree("S", tuple(pieces))
        own = ["abcdefgh"[i] for i in torch.randint(8, (size,), generator=generator)]
        texts.append(bracketed(tree, own))
        trees.append(tree)
        words.append(own)
    return texts, trees, words


def states_of(model: pb.Model, texts: Sequence[str], words: Sequence[Sequence[str]]) -> list[list[Tensor]]:
    """[layer][text] states of letters [leaf, width] by transformers alone; after a start token each letter is one, and so is each space."""
    layers: list[list[Tensor]] = [[], []]
    for own in words:
        ids = torch.tensor([model.tokenizer(" ".join(own))["input_ids"]])  # type: ignore[misc]
        with torch.no_grad():
            hidden = model.hf(ids, output_hidden_states=True).hidden_states
        for layer, out in zip(hidden[:2], layers, strict=True):
            out.append(layer[0, 1::2].double())
    return layers


def scaled_by_hand(states: list[Tensor], train: list[int]) -> list[Tensor]:
    seen = torch.cat([states[i] for i in train])
    centre = seen.mean(0)
    size = ((seen - centre) ** 2).mean().sqrt()
    return [(x - centre) / size for x in states]


def trained_by_hand(
    x: list[Tensor], codes: list[Any], train: list[int], rank: int, steps: int, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B = torch.linalg.qr(
        torch.randn(x[0].shape[1], rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    B = B.clone().requires_grad_()
    C, U = (torch.zeros(rank, len(names), dtype=torch.float64, requires_grad=True) for names in (LABELS, UNARY))
    adam = torch.optim.Adam([C, U] if frozen else [B, C, U])
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        order, wrong_c, wrong_u = [], [], []
        for i in train:
            z = x[i] @ B
            d = [((z[j + 1] - z[j]) ** 2).sum() for j in range(len(z) - 1)]
            pairs = [
                torch.relu(1 - (d[a] - d[b]))
                for a in range(len(d))
                for b in range(len(d))
                if codes[i].d[a] > codes[i].d[b]
            ]
            order.append(sum(pairs) / len(pairs))
            wrong_c += [-((z[j + 1] - z[j]) @ C).log_softmax(0)[LABELS.index(codes[i].c[j])] for j in range(len(d))]
            wrong_u += [-(z[j] @ U).log_softmax(0)[UNARY.index(codes[i].u[j])] for j in range(len(z))]
        loss = sum(order) / len(order) + sum(wrong_c) / len(wrong_c) + sum(wrong_u) / len(wrong_u)
        loss = loss + 5 * ((B.T @ B - torch.eye(rank, dtype=torch.float64)) ** 2).sum()
        adam.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        adam.step()
    return B.detach(), C.detach(), U.detach()


def nodes_by_hand(d: list[float], c: list[str], u: list[str]) -> list[tuple[str, int, int]]:
    """Every node that is no <empty> one, with its first and last leaf."""
    found = [(u[i], i, i) for i in range(len(u)) if u[i] != EMPTY]
    todo = [(0, len(u) - 1)]
    while todo:
        a, b = todo.pop()
        if a == b:
            continue
        at = max(range(a, b), key=lambda i: (d[i], -i))
        found += [(c[at], a, b)] * (c[at] != EMPTY)
        todo += [(a, at), (at + 1, b)]
    return found


def f1_by_hand(found: list[Any], gold: list[Any]) -> tuple[float, float, float]:
    left, both = list(gold), 0
    for node in found:
        if node in left:
            left.remove(node)
            both += 1
    precision, recall = (both / len(some) if some else 0.0 for some in (found, gold))
    return (2 * precision * recall / (precision + recall) if both else 0.0), precision, recall


def test_reference() -> None:
    """Loss, training, decoding, counts of nodes, the floor and the dealt trees, of the texts that are held out."""
    model = pb.load(given.lent("gpt2").hf, letters("characters"))
    texts, trees, words = drawn(12, 3)
    found = pb.find.tree_probe(model, texts, kind="brackets", rank=4, steps=8, draws=1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    held, train = sorted(order[:3]), sorted(order[3:])
    own = [coded(tree) for tree in trees]
    generator = torch.Generator().manual_seed(0)
    dealt = []
    for code in own:
        inner, leaves = (torch.randperm(len(some), generator=generator).tolist() for some in (code.d, code.u))
        dealt.append(type(code)([code.d[i] for i in inner], [code.c[i] for i in inner], [code.u[i] for i in leaves]))
    for row, states in enumerate(states_of(model, texts, words)):
        x = scaled_by_hand(states, train)
        for name, codes, frozen in (("f1", own, False), ("random", own, True), ("null_mean", dealt, False)):
            B, C, U = trained_by_hand(x, codes, train, 4, 8, frozen)
            told = []
            for i in held:
                z = x[i] @ B
                step = z[1:] - z[:-1]
                said = nodes_by_hand(
                    (step**2).sum(1).tolist(),
                    [LABELS[j] for j in (step @ C).argmax(1)],
                    [UNARY[j] for j in (z @ U).argmax(1)],
                )
                told.append(f1_by_hand(said, nodes_by_hand(codes[i].d, codes[i].c, codes[i].u)))
            mean = np.mean(told, 0)
            assert close(float(found[name][row]), mean[0], of=1.0), (name, row)
            if name == "f1":
                assert close(float(found["precision"][row]), mean[1], of=1.0)
                assert close(float(found["recall"][row]), mean[2], of=1.0)
    floors = []
    for i in held:
        c = [
            commonest([(w[j + 1], own[t].c[j]) for t in train for w in [words[t]] for j in range(len(w) - 1)], word)
            for word in words[i][1:]
        ]
        u = [
            commonest([(w[j], own[t].u[j]) for t in train for w in [words[t]] for j in range(len(w))], word)
            for word in words[i]
        ]
        said = nodes_by_hand(list(range(len(c), 0, -1)), c, u)
        floors.append(f1_by_hand(said, nodes_by_hand(own[i].d, own[i].c, own[i].u))[0])
    assert close(float(found["floor"]), np.mean(floors), of=1.0)
    assert close(found["gain"], found.values - np.mean(floors), of=1.0)


def commonest(seen: list[tuple[str, str]], word: str) -> str:
    own = [label for one, label in seen if one == word] or [label for _, label in seen]
    return Counter(own).most_common(1)[0][0]


def test_reference_of_dependencies() -> None:
    """Distances trained by loops, spanning trees and correlations by scipy."""
    model = pb.load(given.lent("gpt2").hf, letters("characters"))
    generator = torch.Generator().manual_seed(2)
    words = [["abcdefgh"[i] for i in torch.randint(8, (5,), generator=generator)] for _ in range(8)]
    heads = [[-1, *(int(torch.randint(i, (1,), generator=generator)) for i in range(1, 5))] for _ in range(8)]
    texts = [conllu(own, tree) for own, tree in zip(words, heads, strict=True)]
    found = pb.find.tree_probe(model, texts, kind="conllu", rank=3, steps=6, draws=1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    held, train = sorted(order[:2]), sorted(order[2:])
    for row, states in enumerate(states_of(model, texts, words)):
        x = scaled_by_hand(states, train)
        B = torch.linalg.qr(
            torch.randn(x[0].shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        )[0]
        B = B.clone().requires_grad_()
        adam = torch.optim.Adam([B])
        for step in range(6):
            adam.param_groups[0]["lr"] = 0.01 * (1 - step / 6)
            losses = []
            for i in train:
                z, n = x[i] @ B, 5
                apart = distances(heads[i])
                losses.append(
                    sum((((z[a] - z[b]) ** 2).sum() - apart[a, b]).abs() for a in range(n) for b in range(n)) / n**2
                )
            adam.zero_grad()
            (sum(losses) / len(losses)).backward()  # type: ignore[union-attr]
            adam.step()
        edges_found, ranks = [], []
        for i in held:
            z = (x[i] @ B).detach()
            table = ((z[:, None] - z[None]) ** 2).sum(-1).numpy()
            tree = np.argwhere(scipy.sparse.csgraph.minimum_spanning_tree(table).toarray())
            gold = {tuple(sorted((w, h))) for w, h in enumerate(heads[i]) if h >= 0}
            edges_found.append(len({tuple(sorted(edge)) for edge in tree.tolist()} & gold) / 4)
            above = np.triu_indices(5, 1)
            ranks.append(scipy.stats.spearmanr(table[above], distances(heads[i]).numpy()[above]).statistic)
        assert close(float(found["uuas"][row]), np.mean(edges_found), of=1.0)
        assert close(float(found["spearman"][row]), np.mean(ranks), of=1.0)
    assert close(
        float(found["floor"]),
        np.mean([sum(h >= 0 and w - h == 1 for w, h in enumerate(heads[i])) / 4 for i in held]),
        of=1.0,
    )


def test_null() -> None:
    """Trees that nothing in the letters says: read no better than dealt ones, and never above what needs no model."""
    model = pb.load(given.lent("llama").hf, letters("characters"))
    found = pb.find.tree_probe(model, drawn(32, 7)[0], kind="brackets", rank=6, steps=25, draws=9)
    assert float(found["p"].min()) > 0.1
    assert "NOT above what needs no model" in found.notes[0]
    assert float((found.values - found["null_mean"]).abs().max()) < 0.25


def test_p_is_of_the_best_layer() -> None:
    """A dealt tree counts by the layer in which it is read best, and a tie counts."""
    scores = torch.zeros(2, 5, 4, 3, dtype=torch.float64)  # [layer, problem, text, measure]
    scores[:, 0, :, 0] = torch.tensor([[0.5], [0.3]])
    scores[0, 2:, :, 0] = torch.tensor([[0.1], [0.2], [0.3]])
    scores[1, 2:, :, 0] = torch.tensor([[0.1], [0.6], [0.0]])
    asked = module.constituency([of_brackets("(S a b)")] * 4, [0], 3, 0)
    found = module._result(asked, scores, None, torch.full((4,), 0.1, dtype=torch.float64), ["L0", "L1"], [], (1, 4, 2))
    assert close(found["p"], [2 / 4, 3 / 4])
    assert close(found["null_mean"], [0.2, 0.7 / 3])
    assert close(found["gain"], [0.4, 0.2])


# --- trees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [json.dumps, textwrap.dedent, inspect.signature, Path.glob, torch.nn.functional.gumbel_softmax, ast.parse],
)
def test_a_tree_of_python_comes_back(function: Any) -> None:
    """Both ways and in its spans: each node's text is that of Python's own `ast`."""
    text = textwrap.dedent(inspect.getsource(function))
    parsed = of_python(text)
    code = coded(parsed.tree)
    assert decoded(*code) == [parsed.tree]
    said: Counter[tuple[str, str]] = Counter()
    for (label, first, last), n in nodes([parsed.tree]).items():
        said[label, text[parsed.spans[first][0] : parsed.spans[last][1]]] += n
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name | ast.Call | ast.Attribute | ast.BinOp | ast.Compare | ast.Return | ast.arg):
            assert said[type(node).__name__, ast.get_source_segment(text, node)] > 0  # type: ignore[index]


def test_leaves_of_python() -> None:
    """Bytes are not characters, comments are no leaves, a formatted string is one, what ast places nowhere hangs on its parent."""
    text = 'def é(a, *, b=1):  # ü\n    return ("ö", f"{a!r:>{b}} é" f"z", [x for x in a])\n'
    parsed = of_python(text)
    leaves = [text[a:b] for a, b in parsed.spans]
    assert leaves == [
        "def",
        "é",
        "(",
        "a",
        ",",
        "*",
        ",",
        "b",
        "=",
        "1",
        ")",
        ":",
        "return",
        "(",
        '"ö"',
        ",",
        'f"{a!r:>{b}} é"',
        'f"z"',
        ",",
        "[",
        "x",
        "for",
        "x",
        "in",
        "a",
        "]",
        ")",
    ]
    found = nodes([parsed.tree])
    assert found["arguments", 3, 9] == found["comprehension", 22, 24] == found["JoinedStr", 16, 17] == 1
    assert found["Constant", 14, 14] == 1
    decorated = of_python("@dec(1)\nclass A: pass\n")
    assert decorated.tree.label == "Module"
    assert decoded(*coded(decorated.tree)) == [decorated.tree]


def test_heights_and_labels_by_hand() -> None:
    """(S (NP the cat) (VP (V sat) down here)): heights of common ancestors, a fused chain, a unary label, two <empty> splits."""
    parsed = of_brackets("(S (NP the cat) (X (VP (V sat) down here)))")
    assert parsed.text == "the cat sat down here"
    code = coded(parsed.tree)
    assert code.d == [1, 3, 2, 1]
    assert code.c == ["NP", "S", "X<sep>VP", "<empty>"]
    assert code.u == [EMPTY, EMPTY, "V", EMPTY, EMPTY]
    assert decoded(*code) == [parsed.tree]
    assert decoded([1, 3], [EMPTY, EMPTY], [EMPTY, EMPTY, "V"]) == [0, 1, Tree("V", (2,))]  # a root that dissolves
    assert decoded([1, 1], ["A", "B"], [EMPTY] * 3) == [Tree("A", (0, Tree("B", (1, 2))))]  # of equal heights the first


def test_repeated_nodes_count_once_each() -> None:
    """Twice the same chain is two nodes; a node found once of two is recall one half, and never more than 1."""
    gold, said = nodes([Tree("A", (Tree("A", (0, 1)),))]), nodes([Tree("A", (0, 1))])
    assert agreement(said, gold) == (1.0, 0.5, 2 / 3)
    assert agreement(gold, gold) == (1.0, 1.0, 1.0)
    assert agreement(Counter(), gold) == (0.0, 0.0, 0.0)


def test_sentences() -> None:
    """Words of a multiword token lie where it lies, empty nodes are none, and forms are found in the text."""
    rows = [
        "1-2\tdu\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No",
        "1\tde\t_\t_\t_\t_\t3\t_\t_\t_",
        "2\tle\t_\t_\t_\t_\t3\t_\t_\t_",
    ]
    rows += ["3\tlac\t_\t_\t_\t_\t0\t_\t_\t_", "3.1\tx\t_\t_\t_\t_\t_\t_\t_\t_", "4\t!\t_\t_\t_\t_\t3\t_\t_\t_"]
    plain = of_conllu("\n".join(rows))
    assert plain.text == "dulac !"
    assert plain.spans == [(0, 2), (0, 2), (2, 5), (6, 7)]
    assert plain.heads == [2, 2, -1, 2]
    assert of_conllu("\n".join(["# text = du  lac!", *rows])).spans == [(0, 2), (0, 2), (4, 7), (7, 8)]
    assert distances([2, 2, -1, 2]).tolist()[0] == [0.0, 2.0, 1.0, 2.0]


def test_what_is_refused() -> None:
    model = pb.load(given.lent("gpt2").hf, letters("characters"))
    trees = drawn(6, 1)[0]
    for texts, kind, says in (
        (trees, "yaml", "kind='yaml'; possible are python, brackets, conllu"),
        (trees[:3], "brackets", "3 texts with a tree that can be read: 4 or more"),
        ([*trees, "(S a"], "brackets", "ends before its brackets close"),
        ([*trees, "(S a) b"], "brackets", "one pair of brackets around all"),
        ([*trees, "(S a ())"], "brackets", r"\(LABEL children"),
        (["def f(:"] * 4, "python", "not Python as this interpreter reads it"),
        ([conllu(["a", "b"], [1, 0])] * 4, "conllu", "no tree with one root"),
        ([conllu(["a", "b"], [-1, 0], "a c")] * 4, "conllu", "'b' does not stand in the text"),
        (["1\ta"] * 4, "conllu", "ten columns"),
        ("(S a b)", "brackets", "a list of texts"),
    ):
        with pytest.raises(pb.PatchbayError, match=says):
            pb.find.tree_probe(model, texts, kind=kind)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="rank=99"):
        pb.find.tree_probe(model, trees, kind="brackets", rank=99)
    again = pb.find.tree_probe(model, [*trees, trees[0], "(S a)"], kind="brackets", steps=1, draws=1)
    assert "1 texts that came again were left out" in again.notes
    assert any("1 texts were left out: 2 to 200 leaves" in note for note in again.notes)


@pytest.mark.slow  # several fits on 200 sentences
@pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason=f"no {SHARED}: set PATCHBAY_SHARED to the folder of shared data"
)
def test_dependencies_of_a_small_trained_model_are_an_honest_negative() -> None:
    """A model of stories finds fewer edges of real English than joining neighbours does, and hardly more than new weights."""
    blocks = (SHARED / "data/ud_en_ewt_dev.conllu").read_text(encoding="utf-8").split("\n\n")
    texts = [
        block for block in blocks if 5 <= len([row for row in block.split("\n") if row.split("\t")[0].isdigit()]) <= 25
    ][:200]
    found = pb.find.tree_probe(
        pb.load(SHARED / "models/stories260K"), texts, kind="conllu", rank=32, steps=100, draws=1
    )
    assert "NOT above what needs no model" in found.notes[0]
    assert float(found.values.max()) < float(found["floor"])
    assert float(found["null_mean"].max()) < float(found.values.min()) + 0.1

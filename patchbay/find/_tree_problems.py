"""What probes of trees are asked, and how they are scored: constituents by F1, dependencies by edges; each with trees that were dealt anew.

Problem 0 has the texts' own trees, problem 1 too (its subspace stays random), all others have trees in which every text's own heights and labels, or
words, changed places: as many of each, and nothing that the text says.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._dependencies import Sentence, distances, edges, spanning
from patchbay.find._tree_fit import Constituents, Fitted, between, heights, projected
from patchbay.find._trees import EMPTY, Coded, Node, Parsed, agreement, coded, decoded, nodes


@dataclass(frozen=True)
class Constituency:
    """Trees of constituents: `codes` [problem][text], the leaves' words, and the labels that training texts have."""

    codes: list[list[Coded]]
    words: list[list[str]]
    c_names: list[str]
    u_names: list[str]
    measures = ("f1", "precision", "recall")
    unit = "F1"

    def alone(self) -> Constituency:
        """The first problem by itself."""
        return replace(self, codes=self.codes[:1])

    def __len__(self) -> int:
        return len(self.codes)

    def target(self, rows: Sequence[int], width: int) -> Constituents:
        c_at, u_at = ({name: i for i, name in enumerate(names)} for names in (self.c_names, self.u_names))
        sizes = (len(self.codes), len(rows))
        d, c, u = (torch.full((*sizes, width - short), -1, dtype=torch.int64) for short in (1, 1, 0))
        for problem, codes in enumerate(self.codes):
            for at, row in enumerate(rows):
                code = codes[row]
                n = len(code.d)
                d[problem, at, :n] = torch.tensor(code.d)
                c[problem, at, :n] = torch.tensor([c_at.get(name, -1) for name in code.c])
                u[problem, at, : n + 1] = torch.tensor([u_at.get(name, -1) for name in code.u])
        return Constituents(d, c, u, len(self.c_names), len(self.u_names))

    def scores(self, fitted: Fitted, x: Tensor, rows: Sequence[int]) -> Tensor:
        """F1, precision and recall, [problem, text, measure]; x [text, leaf, width] of these rows."""
        z = projected(x, fitted.B)
        d = heights(z)
        c = (z.diff(dim=-2) @ fitted.C[:, None]).argmax(-1).tolist()
        u = (z @ fitted.U[:, None]).argmax(-1).tolist()
        found = torch.empty(len(z), len(rows), 3, dtype=torch.float64)
        for problem, codes in enumerate(self.codes):
            for at, row in enumerate(rows):
                n = len(codes[row].u)
                said = Coded(
                    d[problem, at, : n - 1].tolist(),
                    [self.c_names[i] for i in c[problem][at][: n - 1]],
                    [self.u_names[i] for i in u[problem][at][:n]],
                )
                precision, recall, f1 = agreement(_nodes(said), _nodes(codes[row]))
                found[problem, at] = torch.tensor([f1, precision, recall])
        return found

    def floor(self, train: Sequence[int], rows: Sequence[int]) -> Tensor:
        """F1 [text] of trees that branch to the right everywhere, with the commonest labels of each word in training texts."""
        c_of, u_of = _commonest(self, train)
        found = []
        for row in rows:
            words, code = self.words[row], self.codes[0][row]
            n = len(words)
            said = Coded(list(range(n - 1, 0, -1)), [c_of(word) for word in words[1:]], [u_of(word) for word in words])
            found.append(agreement(_nodes(said), _nodes(code))[2])
        return torch.tensor(found, dtype=torch.float64)


def _nodes(code: Coded) -> Counter[Node]:
    return nodes(decoded(code.d, code.c, code.u))


def _commonest(asked: Constituency, train: Sequence[int]):  # type: ignore[no-untyped-def]
    """The commonest label before a word, and over it, in the training texts; of words that they lack, of all."""
    tables: list[defaultdict[str | None, Counter[str]]] = [defaultdict(Counter), defaultdict(Counter)]
    for row in train:
        words, code = asked.words[row], asked.codes[0][row]
        for table, labels, of in zip(tables, (code.c, code.u), (words[1:], words), strict=True):
            for word, label in zip(of, labels, strict=True):
                table[word][label] += 1
                table[None][label] += 1
    return [lambda word, table=table: table[word if word in table else None].most_common(1)[0][0] for table in tables]


def constituency(parsed: Sequence[Parsed], train: Sequence[int], draws: int, seed: int) -> Constituency:
    own = [coded(one.tree) for one in parsed]
    words = [[one.text[a:b] for a, b in one.spans] for one in parsed]
    generator = torch.Generator().manual_seed(seed)
    dealt = [[_dealt(code, generator) for code in own] for _ in range(draws)]
    names = [sorted({EMPTY} | {label for row in train for label in labels(own[row])}) for labels in (_c, _u)]
    return Constituency([own, own, *dealt], words, *names)


def _c(code: Coded) -> list[str]:
    return code.c


def _u(code: Coded) -> list[str]:
    return code.u


def _dealt(code: Coded, generator: torch.Generator) -> Coded:
    inner, leaves = (torch.randperm(len(some), generator=generator).tolist() for some in (code.d, code.u))
    return Coded([code.d[i] for i in inner], [code.c[i] for i in inner], [code.u[i] for i in leaves])


@dataclass(frozen=True)
class Dependency:
    """Trees of dependencies: `heads` [problem][text]."""

    heads: list[list[list[int]]]
    measures = ("uuas", "spearman")
    unit = "share of edges"

    def alone(self) -> Dependency:
        return Dependency(self.heads[:1])

    def __len__(self) -> int:
        return len(self.heads)

    def target(self, rows: Sequence[int], width: int) -> Tensor:
        table = torch.full((len(self.heads), len(rows), width, width), -1.0, dtype=torch.float64)
        for problem, heads in enumerate(self.heads):
            for at, row in enumerate(rows):
                n = len(heads[row])
                table[problem, at, :n, :n] = distances(heads[row])
        return table

    def scores(self, fitted: Fitted, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Share of edges found, and Spearman's correlation of distances, [problem, text, measure]."""
        apart = between(projected(x, fitted.B))
        found = torch.empty(len(apart), len(rows), 2, dtype=torch.float64)
        for problem, heads in enumerate(self.heads):
            for at, row in enumerate(rows):
                n = len(heads[row])
                table, gold = apart[problem, at, :n, :n], edges(heads[row])
                upper = torch.triu_indices(n, n, 1)
                found[problem, at, 0] = len(spanning(table) & gold) / len(gold)
                found[problem, at, 1] = maths.spearman(table[tuple(upper)], distances(heads[row])[tuple(upper)])
        return found

    def floor(self, train: Sequence[int], rows: Sequence[int]) -> Tensor:
        """The share of edges [text] that join neighbours."""
        joined = [sum(b - a == 1 for a, b in edges(self.heads[0][row])) / (len(self.heads[0][row]) - 1) for row in rows]
        return torch.tensor(joined, dtype=torch.float64)


def dependency(sentences: Sequence[Sentence], draws: int, seed: int) -> Dependency:
    own = [one.heads for one in sentences]
    generator = torch.Generator().manual_seed(seed)
    dealt = []
    for _ in range(draws):
        orders = [torch.randperm(len(heads), generator=generator).tolist() for heads in own]
        dealt.append([_moved(heads, order) for heads, order in zip(own, orders, strict=True)])
    return Dependency([own, own, *dealt])


def _moved(heads: list[int], order: list[int]) -> list[int]:
    """The tree in which word i's place is taken by word order[i]."""
    found = [-1] * len(heads)
    for word, head in enumerate(heads):
        found[order[word]] = -1 if head < 0 else order[head]
    return found

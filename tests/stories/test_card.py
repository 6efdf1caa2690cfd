"""Cards of parts: the planted expert, component and contexts are named; contexts equal a plain loop, over streams in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from patchbay.signal.port import PatchbayError
from patchbay.stories import _contexts, survey
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.tolerance import close

TEXTS = [
    "Mary and John went to the store. John gave a hat to Mary.",
    "The capital of Lolavia is Budurg.",
    "Emma asked Kate about the violin.",
]


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load("tiny")


def by_hand(model: pb.Model, port: str, texts: list[str], n: int) -> list[tuple[float, int, int]]:
    """The highest numbers of a signal with their text and position, from one run of each text."""
    found = []
    for i, text in enumerate(texts):
        signal = pb.run(model, text, taps=[port])[port][0]
        found += [(float(value.norm() if value.ndim else value), i, at) for at, value in enumerate(signal)]
    return sorted(found, reverse=True)[:n]


@pytest.mark.parametrize(
    ("part", "port"), [("L1.N5", "L1.N5.act"), ("L2.H1", "L2.H1.out"), ("L1.mlp", "L1.mlp.out"), ("L1.H2.z", "L1.H2.z")]
)
def test_contexts_are_those_of_a_plain_loop(model: pb.Model, part: str, port: str) -> None:
    found = model.card(part, texts=TEXTS, n=5, batch_size=2)["contexts"]
    expected = by_hand(model, port, TEXTS, 5)
    assert [(row["text"], row["position"]) for row in found["rows"]] == [(i, at) for _, i, at in expected]
    assert close([row["value"] for row in found["rows"]], [value for value, _, _ in expected], noise=256)
    for row in found["rows"]:
        ids = model.encode(TEXTS[row["text"]])[0]
        assert row["token"] == model.decode([ids[row["position"]]])
        assert f"{_contexts.OPEN}{row['token'].lstrip(' ')}{_contexts.CLOSE}" in row["context"]
    assert found["tokens"] == sum(len(model.encode(text)[0]) for text in TEXTS)
    assert found["texts"] == 3


def test_a_component_is_read_along_the_direction_that_it_writes(model: pb.Model) -> None:
    from patchbay.wiring.components import components

    found = model.card("L1.H3.C0", texts=TEXTS, n=3)
    direction = components(model, "L1.H3").v[0]
    every = [
        (float(at), i, p)
        for i, text in enumerate(TEXTS)
        for p, at in enumerate(pb.run(model, text, taps=["L1.H3.out"])["L1.H3.out"][0] @ direction)
    ]
    best = sorted(every, reverse=True)[:3]
    assert close([row["value"] for row in found["contexts"]["rows"]], [value for value, _, _ in best], noise=256)
    assert found["contexts"]["measure"] == "coefficient of L1.H3.C0"
    assert {row["does"] for row in found["words"]} == {"reads", "writes"}
    assert "% of what L1.H3 can write" in found["words"][0]["direction"]


def test_planted_expert_is_chosen_by_its_class_and_writes_its_token() -> None:
    built = planted.routed_expert(seed=1)
    model = pb.load(built.model, built.tokenizer)
    card = model.card(built.truth["expert"], texts=built.truth["prompts"], n=8)
    words = {model.decode([i]).strip() for i in built.truth["class_ids"]}
    router = next(row for row in card["words"] if row["direction"] == "router")
    assert {token.strip() for token in router["most"]} <= words or words <= {token.strip() for token in router["most"]}
    writes = next(row for row in card["words"] if row["does"] == "writes")
    assert model.decode([built.truth["token_id"]]).strip() in {
        token.strip() for token in writes["most"] + writes["least"]
    }
    assert {row["token"].strip() for row in card["contexts"]["rows"]} <= words
    assert card["contexts"]["measure"] == "routing weight"


def test_a_planted_neurons_contexts_are_its_words_and_a_null_neurons_are_not() -> None:
    built = planted.relation_neuron(form="llama", seed=1)
    model = pb.load(built.model, built.tokenizer)
    neuron, prompts = built.truth["neurons"][" has"], built.truth["prompts"]
    rows = model.card(neuron, texts=prompts, n=4)["contexts"]["rows"]
    assert {row["token"] for row in rows} == {" has"}
    null = pb.load(planted.null(form="llama", seed=1).model)
    found = null.card("L0.N3", texts=torch.randint(3, 60, (40, 12), generator=torch.Generator().manual_seed(0)), n=12)[
        "contexts"
    ]["rows"]
    assert len({row["token"] for row in found}) > 1


def test_texts_come_as_a_stream_are_cut_and_each_context_is_told_once(
    model: pb.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_contexts, "PIECE", 8)
    held = [0]

    def stream() -> Iterator[str]:
        for i in range(400):
            held[0] = i
            yield TEXTS[i % 3]

    sizes: list[int] = []
    kept = _contexts.Contexts.add
    monkeypatch.setattr(
        _contexts.Contexts, "add", lambda self, *a: (kept(self, *a), sizes.append(len(self.highest)))[0]
    )
    found = model.card("L1.N5", texts=stream(), n=4, batch_size=4)["contexts"]
    assert held[0] == 399
    assert found["texts"] == 400
    assert max(sizes) <= 4
    contexts = [row["context"] for row in found["rows"]]
    assert len(contexts) == len(set(contexts)) == 4
    assert all(
        len(model.encode(row["context"].strip("«»").replace("«", "").replace("»", ""))[0]) <= 8 for row in found["rows"]
    )


def test_roles_are_the_ranks_in_the_finders(model: pb.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: survey.ROLES[name] for name in ("previous_token_heads", "induction_heads")}
    monkeypatch.setattr(survey, "ROLES", few)
    monkeypatch.setattr(survey, "RANKING", {"head": (), "neuron": ("neuron_vocabulary",), "expert": ()})
    names = [str(row["part"]) for row in pb.find.neuron_vocabulary(model).table()]
    neuron = model.card(names[6], roles=True)["roles"]
    assert [(row["finder"], row["rank"], row["of"]) for row in neuron] == [("neuron_vocabulary", 7, len(names))]
    assert model.card("L1.mlp", roles=True)["roles"] == []
    rows = model.card("L1.H3", roles=True)["roles"]
    named = {row["finder"]: row for row in rows}
    task = pb.tasks.repeated_tokens(model, 32, seed=0)
    ranked = [str(row["part"]) for row in pb.find.induction_heads(model, task).table()]
    assert named["induction_heads"]["rank"] == 1 + ranked.index("L1.H3")
    assert named["induction_heads"]["of"] == len(ranked)
    assert rows[0]["rank"] == min(row["rank"] for row in rows)


@pytest.mark.parametrize(
    ("part", "said"),
    [("L1.router", "contexts are those of a head"), ("L0.KV0", "contexts are those of a head"), ("L1.attn.pattern", "one number or one vector at each token"),
     ("L1.H3.C99", "has components 0.."), ("L1.X2", "asked for signal 'X2'"), ("embed.positions", "writes the same at every token")],
)  # fmt: skip
def test_what_has_no_contexts_is_refused_by_name(model: pb.Model, part: str, said: str) -> None:
    with pytest.raises(PatchbayError, match=said):
        model.card(part, texts=TEXTS)


def test_a_model_without_a_tokenizer_and_texts_without_a_token() -> None:
    bare = pb.load(twin("llama"))
    rows = bare.card("L0.N3", texts=[[5, 6, 7], [9, 9]], n=2)["contexts"]["rows"]
    assert all(row["token"].isdigit() for row in rows)
    with pytest.raises(PatchbayError, match="no texts were given"):
        bare.card("L0.N3", texts=[])


def test_the_command_streams_a_file(model: pb.Model, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    told = CliRunner().invoke(cli, ["show", "tiny", "L1.N5", "--texts", str(path), "--rows", "2", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["contexts"]["rows"] == model.card("L1.N5", texts=TEXTS, n=2)["contexts"]["rows"]
    shown = CliRunner().invoke(cli, ["show", "tiny", "L1.H3.C0", "--texts", str(path)])
    assert "coefficient of L1.H3.C0" in shown.output
    card = model.card("L1.N5", texts=TEXTS)
    assert "in the weights" in repr(card)
    assert "<table>" in card._repr_html_()
    refused = CliRunner().invoke(cli, ["show", "tiny", "--texts", str(path)])
    assert refused.exit_code == 2
    assert "of one part" in refused.output

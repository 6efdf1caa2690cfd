"""Attribution graphs as the JSON file of circuit-tracer (schema 1), for its viewer, and such files read back as Results.

A file holds one prompt: `metadata`, `qParams`, `nodes` and `links`. Features are "cross layer transcoder" nodes `LAYER_FEATURE_POSITION`, errors
`LAYER_-1_POSITION`, tokens `E_ID_POSITION`, logits one layer above the last but one; `influence` is cumulative there: the share of the influence that
the node and all stronger ones hold. Biases, which that form has not, and each node's own influence stand under `patchbay`, which its viewer passes over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchbay.results.arrays import Arrays
from patchbay.signal.port import Part, PatchbayError

KINDS = {
    "cross layer transcoder": "feature",
    "mlp reconstruction error": "error",
    "embedding": "embed",
    "logit": "logit",
}
TYPES = {kind: name for name, kind in KINDS.items()}
UNIT = "share of the logits"


def is_graph(result: Arrays) -> bool:
    """Whether a Result holds attribution graphs."""
    return {"nodes", "edges", "tokens"} <= set(result.tables) and "influence" in result


def as_file(result: Arrays, prompt: int = 0) -> dict[str, Any]:
    """One prompt's graph as circuit-tracer's data. Raises PatchbayError for a Result that holds none of that prompt."""
    if not is_graph(result):
        raise PatchbayError("this Result holds no attribution graph; find.attribution_graph makes one")
    tokens, nodes, edges = (
        [row for row in result.tables[name] if row["prompt"] == prompt] for name in ("tokens", "nodes", "edges")
    )
    if not tokens:
        there = sorted({row["prompt"] for row in result.tables["tokens"]})
        raise PatchbayError(f"prompt={prompt}: the graphs here are of prompts {', '.join(map(str, there))}")
    ids = {row["node"]: _id(row) for row in nodes}
    made = [_node(row, ids[row["node"]], result) for row in nodes if row["kind"] in TYPES]
    links = [{"source": ids[row["source"]], "target": ids[row["target"]], "weight": row["weight"]} for row in edges]
    biases = [row for row in nodes if row["kind"] == "bias"]
    named = {ids[row["node"]] for row in biases}
    model = result.provenance.get("model") or {}
    words = [str(row["token"]) for row in tokens]
    held = (model.get("dictionaries") or {}) if isinstance(model, Mapping) else {}
    return {
        "metadata": {
            "slug": f"graph-{prompt}",
            "scan": str(model.get("source") or model.get("fingerprint") or "model"),
            "transcoder_list": [str(one.get("source") or one.get("digest")) for _, one in sorted(held.items())],
            "prompt_tokens": words,
            "prompt": "".join(words),
            "node_threshold": (result.provenance.get("options") or {}).get("keep_nodes"),
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": made,
        "links": [link for link in links if link["source"] not in named],
        "patchbay": {
            "tokens": [row["id"] for row in tokens],
            "rows": nodes,
            "bias_links": [link for link in links if link["source"] in named],
            "ids": ids,
        },
    }


def _id(row: Mapping[str, Any]) -> str:
    layer, at, index = row["layer"], row["position"], row["index"]
    if row["kind"] == "embed":
        return f"E_{index}_{at}"
    if row["kind"] == "bias":
        return str(row["node"])
    return f"{layer + (row['kind'] == 'logit')}_{-1 if row['kind'] == 'error' else index}_{at}"


def _node(row: Mapping[str, Any], name: str, result: Arrays) -> dict[str, Any]:
    kind, layer, at, index = row["kind"], row["layer"], row["position"], row["index"]
    text = "E" if kind == "embed" else str(layer + 1 if kind == "logit" else layer)
    feature = {"feature": (layer + index) * (layer + index + 1) // 2 + index, "error": -1, "embed": at}.get(kind, index)
    js = {"feature": f"{layer}_{index}-0", "error": f"{layer}_-1-{at}", "embed": f"E_{index}-{at}"}.get(
        kind, f"L_{index}-{at}"
    )
    logits = [one for one in result.tables["nodes"] if one["kind"] == "logit" and one["prompt"] == row["prompt"]]
    chance = row["influence"] if kind == "logit" else 0.0
    return {
        "node_id": name,
        "feature": feature,
        "layer": text,
        "ctx_idx": at,
        "feature_type": TYPES[kind],
        "token_prob": chance,
        "is_target_logit": kind == "logit" and row["node"] == logits[0]["node"],
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js,
        "clerp": f'Output "{row["token"]}" (p={chance:.3f})'
        if kind == "logit"
        else row["part"]
        if kind == "feature"
        else "",
        "influence": None if kind == "logit" else row["cumulative"],
        "activation": row["activation"],
    }


# --- reading ----------------------------------------------------------------------------------------


def read_file(path: Path) -> dict[str, Any]:
    """The variables, parts, tables and notes of a circuit-tracer file, for a Result. Raises PatchbayError for what is none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        own = held.get("patchbay")
        rows = own["rows"] if own else _rows(held["nodes"])
        names = (
            {name: text for text, name in own["ids"].items()}
            if own
            else {one["node_id"]: row["node"] for one, row in zip(held["nodes"], rows, strict=True)}
        )
        links = [*held["links"], *(own["bias_links"] if own else [])]
        edges = [
            {
                "prompt": 0,
                "source": names[one["source"]],
                "target": names[one["target"]],
                "weight": float(one["weight"]),
            }
            for one in links
        ]
        words = held["metadata"]["prompt_tokens"]
        ids = own["tokens"] if own else _token_ids(rows, len(words))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchbayError(f"{path} is no attribution graph of circuit-tracer's form: {error!r}") from error
    rows = [{**row, "prompt": 0} for row in rows]
    influence: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "feature":
            influence[row["part"]] = influence.get(row["part"], 0.0) + float(row["influence"] or 0.0)
    parts = sorted(influence, key=lambda part: -influence[part])
    notes = [f"read from {path.name}"]
    if not own:
        notes.append(
            "the file's influences are cumulative: a node's own is taken as the step from the one before it, which nodes left out make larger"
        )
    return {
        "values": {"influence": ([influence[part] for part in parts], ("part",), UNIT)},
        "parts": parts,
        "tables": {
            "nodes": rows,
            "edges": edges,
            "tokens": [
                {"prompt": 0, "position": at, "id": token, "token": str(word)}
                for at, (token, word) in enumerate(zip(ids, words, strict=True))
            ],
        },
        "notes": notes,
    }


def _rows(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nodes of a file that others wrote, as rows of our table."""
    rows = []
    last = 0.0
    own: dict[str, float] = {}
    for node in sorted((one for one in nodes if one.get("influence") is not None), key=lambda one: one["influence"]):
        own[node["node_id"]] = node["influence"] - last
        last = node["influence"]
    for node in nodes:
        kind = KINDS[node["feature_type"]]
        at, pieces = int(node["ctx_idx"]), str(node["node_id"]).split("_")
        layer = -1 if kind == "embed" else int(node["layer"]) - (kind == "logit")
        index = 0 if kind == "error" else int(pieces[1])
        part = str(Part(layer, "mlp_feature", index)) if kind == "feature" else ""
        text = {
            "feature": f"{part}@{at}",
            "error": f"L{layer}.mlp.error@{at}",
            "embed": f"embed@{at}",
            "logit": f"logit {index}",
        }[kind]
        influence = float(node["token_prob"]) if kind == "logit" else own.get(node["node_id"], 0.0)
        rows.append(
            {"prompt": 0, "node": text, "kind": kind, "layer": layer, "position": at, "index": index, "influence": influence,
             "cumulative": node.get("influence"), "activation": node.get("activation"), "pre": None, "sum": None, "part": part,
             "token": str(node.get("clerp") or "") if kind == "logit" else ""}
        )  # fmt: skip
    return rows


def _token_ids(rows: list[dict[str, Any]], n: int) -> list[int]:
    """Token ids by position, of the nodes that name them; -1 where none does."""
    found = {row["position"]: row["index"] for row in rows if row["kind"] == "embed"}
    return [found.get(at, -1) for at in range(n)]

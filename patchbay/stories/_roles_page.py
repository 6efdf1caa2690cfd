"""The page of a survey: docs/roles.md."""

from __future__ import annotations

import math
from collections.abc import Mapping

from patchbay.results.result import Result


def page(found: Mapping[str, Result]) -> str:
    """docs/roles.md: the survey of some models, one section each."""
    lines = [
        "# Roles",
        "",
        "What `patchbay find all MODEL` says of the built-in models; written by `python -m patchbay.stories.survey docs`.",
        "",
        "A role is what one finder of heads looks for. `p` is adjusted over the heads of a role. The last columns take the role's",
        "first heads away together, on fresh prompts, against as many random heads of the same layers: a score is not a cause.",
        "Models of twelve heads leave few other heads to draw, so that p can be no smaller than 1 / (1 + different draws).",
    ]
    for name, result in found.items():
        best = {row["role"]: row for row in reversed(result.tables["roles"])}
        ends = {row["role"]: row for row in result.tables["knockout"]}
        lines += ["", f"## {name}", "", f"![Evidence of each role by head](roles-{name}.png)", ""]
        lines += [
            "| role | first head | score | p | task | heads | costs together | random heads | p |",
            "|---" * 9 + "|",
        ]
        for role, row in best.items():
            end = ends.get(role)
            proof = "| | | | | |"
            if end is not None:
                costs = f"{end['effect']:.2f} {end['unit']} | {end['null_mean']:.2f}"
                proof = f"| {end['task']} | {end['heads']} | {costs} | {end['p']:.2g} |"
            p = "" if math.isnan(row["p_adjusted"]) else f"{row['p_adjusted']:.2g}"
            lines.append(f"| {role} | {row['head']} | {row['score']:.3g} {row['unit']} | {p} {proof}")
        lines += ["", "| other finders | best | highest | what it says |", "|---|---|---|---|"]
        for row in result.tables["others"]:
            lines.append(f"| {row['finder']} | {row['best']} | {row['highest']:.3g} {row['unit']} | {row['note']} |")
        if result.tables["not run"]:
            lines += [
                "",
                "Not run: " + "; ".join(f"{row['finder']} ({row['why']})" for row in result.tables["not run"]),
            ]
    return "\n".join(lines) + "\n"

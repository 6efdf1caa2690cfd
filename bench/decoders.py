"""`python -m bench.decoders`: decoders beside people's text, on stories that a model was not shown; the section "decoders" of RESULTS.md.

The prompts are the first 15 tokens of 48 stories from the 700th on of ../shared (newlines as spaces), the references how people went on, 40 tokens;
the model is stories260K with its end tokens off, the judge and the amateur gpt2-sp512, which has the same tokens. `knn` has a store of the first
400 stories. All by `decode.compare`; intervals are 95 % over prompts.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import patchbay as pb
from bench.report import describe, put_section
from bench.shapes import SHARED, checkpoints

N, PROMPT, NEW = 48, 15, 40
DECODERS = {
    "greedy": "greedy",
    "beam of 4": "beam(beams=4)",
    "diverse beam, 6 in 3 groups": "diverse_beam(beams=6, groups=3, penalty=0.5)",
    "ancestral": "samplers(chain=[])",
    "nucleus 0.9": "samplers(chain=['top_p(0.9)'])",
    "min-p 0.1": "samplers(chain=['min_p(0.1)'])",
    "mirostat, 1 nat": "samplers(chain=['mirostat(tau=1.0)'])",
    "contrastive search, 4, 0.6": "contrastive_search(k=4, alpha=0.6)",
    "DoLa, layers 2 and 4": "dola(layers=[2, 4])",
    "superposed, 3 drafts": "superposed(drafts=3)",
    "rerank by PMI": "rerank(scorer='pmi')",
    "best of 8": "best_of_n(drafts=8)",
    "watermark": "watermark()",
}
COLUMNS = ("likelihood", "judge", "diversity", "self_bleu")


def texts() -> tuple[pb.Model, pb.Model, list[list[int]]]:
    """The model, its judge, and every story's tokens."""
    found = checkpoints()
    model, judge = (pb.load(found[name]) for name in ("stories260K", "gpt2-sp512-tinystories-0.28m"))
    model.hf.generation_config.eos_token_id = None
    rows = [json.loads(line) for line in (SHARED / "data/tinystories_train_1000.jsonl").read_text().splitlines()]
    stories = [" ".join((row.get("text") or row.get("story")).split()) for row in rows]
    return model, judge, [list(model.tokenizer(story)["input_ids"])[: PROMPT + NEW + 5] for story in stories]


def table(found: pb.Result) -> list[str]:
    """A line for each decoder: measures with their intervals, likeness and cost."""
    lines = [f"| decoder | {' | '.join(name.replace('_', '-') for name in COLUMNS)} | likeness | passes | fed |", "|---" * 8 + "|"]  # fmt: skip
    for i, name in enumerate(found.labels_of("condition")):
        cells = [f"{float(found[c][i]):.2f} ({float(found[f'{c}_low'][i]):.2f} to {float(found[f'{c}_high'][i]):.2f})" for c in COLUMNS]  # fmt: skip
        cost = [f"{float(found[c][i]):.0f}" if float(found[c][i]) == float(found[c][i]) else "" for c in ("calls", "fed")]  # fmt: skip
        likeness = f"{float(found['likeness'][i]):.2f}"
        lines.append(f"| {' | '.join([name, *cells, likeness, *cost])} |")
    return lines


def gained(parts: pb.Result) -> str:
    """What each line of `knn_parts` gains on the model, with its interval."""
    return "; ".join(f"{row['line']} {row['gain']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in parts.tables["lines"][1:])  # fmt: skip


def main() -> None:
    model, judge, ids = texts()
    held = [row for row in ids[700:] if len(row) >= PROMPT + NEW][:N]
    prompts, people = [row[:PROMPT] for row in held], [row[PROMPT : PROMPT + NEW] for row in held]
    how: dict[str, Any] = {"max_new_tokens": NEW}
    with tempfile.TemporaryDirectory(prefix="patchbay-bench-") as folder:
        pb.run(model, ids[:400], taps=["L4.mlp.in"], folder=f"{folder}/store")
        fast = pb.decode.speculative(model, judge, prompts, chain=[], **how)
        decoders = DECODERS | {
            "contrastive decoding": pb.decode.contrastive_decoding(model, judge, prompts, ends=[], **how),
            "speculative, its own law": fast,
            "kNN, a quarter": pb.decode.knn(model, f"{folder}/store", prompts, weight=0.25, temperature=20.0, **how),
        }
        found = pb.decode.compare(model, prompts, decoders, references=people, judge=judge, **how)
        parts = pb.decode.knn_parts(model, f"{folder}/store", ids[400:520])
    null = found["null"]
    said = [
        f"Likeness of people's text to itself: {float(null.mean()):.2f} ({float(null.min()):.2f} to {float(null.max()):.2f} by halves).",
        f"Speculative: {float(fast['agreed'].nanmean()):.2f} of the draft's tokens agreed with, {float(fast['per_pass'].mean()):.2f} tokens for a pass.",
        f"What the store gains on text not in it, in nats per token of {float(parts['loss'][0]):.3f}: {gained(parts)}.",
    ]
    setting = describe("cpu", model.dtype, "wall", os.getloadavg()[0])
    body = [setting, "", __doc__.split("\n\n", 1)[1].replace("\n", " ").strip(), "", *table(found), "", *said]
    print("\n".join(body))
    put_section("decoders", "\n".join(body))


if __name__ == "__main__":
    main()

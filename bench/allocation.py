"""Three rules of choosing activations on a small trained model: `python -m bench.allocation MODEL [--at L3.resid_out]`.

Texts are the model's own, sampled. Each rule trains a dictionary of the same size on the same tokens; another part of the texts measures it (pb.measure.dictionary):
what is not rebuilt, activations a token by the stored threshold, silent features, and the loss with the signal rebuilt, zeroed and at its mean.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import patchbay as pb
from bench.report import describe, put_section

RULES = ("topk", "batchtopk", "feature_choice")
HEAD = "| rule | FVU (random rows) | L0 (sd) | dead | CE | recovered from zero / mean |\n|---|---|---|---|---|---|"


def sampled(model: pb.Model, n: int, length: int) -> list[list[int]]:
    """Texts that the model says from its start token, at temperature 1."""
    torch.manual_seed(0)
    start = torch.full((n, 1), model.hf.config.bos_token_id or 1)
    ids = model.hf.generate(
        start, max_new_tokens=length - 1, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None
    )
    return ids.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--at", default="L3.resid_out")
    parser.add_argument("--steps", type=int, default=1600)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = pb.load(given.model)
    texts = sampled(model, 480, 128)
    seen, held = texts[:400], texts[400:440]
    rows = []
    for rule in RULES:
        with tempfile.TemporaryDirectory() as folder:
            place = str(Path(folder) / "d")
            pb.train.dictionary(
                model, seen, given.at, form=rule, n_features=512, sparsity=8, steps=given.steps, folder=place
            )  # type: ignore[arg-type]
            result = pb.measure.dictionary(model, held, place)
            found = {name: float(result[name]) for name in result.variables if torch.as_tensor(result[name]).ndim == 0}
        rows.append(
            f"| {rule} | {found['value']:.3f} ({found['null']:.2f}) | {found['l0']:.2f} ({found['l0_sd']:.1f}) | {found['dead']:.3f} | "
            f"{found['ce_rebuilt']:.3f} | {found['recovered_zero']:.3f} / {found['recovered_mean']:.3f} |"
        )
        print(rows[-1], flush=True)
    losses = f"CE {found['ce']:.3f} as it is, {found['ce_zero']:.3f} zeroed, {found['ce_mean']:.3f} at the mean"
    said = f"{Path(given.model).name}, {given.at}: 512 features, 8 a token, {given.steps} steps of 256 tokens, one seed. {losses}."
    setting = describe("cpu", torch.float32, "cpu", 0.0)
    put_section("dictionaries of a small model", "\n".join([setting, "", said, "", HEAD, *rows]))


if __name__ == "__main__":
    main()

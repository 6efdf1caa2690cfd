"""What nnsight finds on a saved model, run by its own Python: `peer_nnsight_agree.py FOLDER GIVEN OUT`; see agree.py."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from nnsight import NNsight
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(folder: str, given_file: str, out: str) -> None:
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    given = json.loads((Path(folder) / given_file).read_text(encoding="utf-8"))
    clean, corrupted = torch.tensor(given["clean"]), torch.tensor(given["corrupted"])
    layer, position = given["layer"], given["position"]
    model = NNsight(hf)
    blocks = model.transformer.h if hf.config.model_type == "gpt2" else model.model.layers
    norm = hf.transformer.ln_f if hf.config.model_type == "gpt2" else hf.model.norm
    n = len(list(blocks))

    def first(value: object) -> object:
        return value[0] if isinstance(value, tuple) else value

    with torch.no_grad():
        with model.trace(input_ids=corrupted, use_cache=False):
            other = first(blocks[layer - 1].output).save()
        with model.trace(input_ids=clean, use_cache=False):
            kept = list().save()
            for i in range(n):
                kept.append(first(blocks[i].output))
            logits = model.output.logits.save()
        with model.trace(input_ids=clean, use_cache=False):
            first(blocks[layer - 1].output)[:, position] = other[:, position]
            patched = model.output.logits.save()
        lens = torch.stack([hf.lm_head(norm(stream)) for stream in kept])
    found = {"logits": logits, "resid_out": torch.stack(list(kept)), "patched": patched, "lens": lens}
    save_file({name: value.detach().float().contiguous() for name, value in found.items()}, str(Path(folder) / out))
    print(json.dumps({"version": version("nnsight")}))


if __name__ == "__main__":
    main(*sys.argv[1:])

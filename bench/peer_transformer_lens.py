"""TransformerLens on a saved model, run by its own Python: `peer_transformer_lens.py FOLDER PART PROMPTS.json THREADS`.

Parts A, B and C are its patching functions on the prompts and their corrupted twins; `composition` is `all_composition_scores`
for Q, K and V. Prints {"seconds": ..., "cells": ...}; in C every eighth cell is run and the time multiplied by eight.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

SAMPLE = 8


def save_tokenizer(folder: str) -> None:
    """The models of the benchmarks come without one and prompts are token ids, but TransformerLens loads none without."""
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def main(folder: str, part: str, prompts: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    if not (Path(folder) / "tokenizer.json").exists():
        save_tokenizer(folder)
    model = TransformerBridge.boot_transformers(folder, device="cpu")
    if part == "composition":
        model.enable_compatibility_mode()
        began, cpu = time.perf_counter(), time.process_time()
        for kind in "QKV":
            model.all_composition_scores(kind)
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(spent | {"cells": 3}))
        return
    with open(prompts, encoding="utf-8") as file:
        given = json.load(file)
    clean, corrupted = torch.tensor(given["clean"]), torch.tensor(given["corrupted"])
    row, right, wrong = torch.arange(len(clean)), torch.tensor(given["right"]), torch.tensor(given["wrong"])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[row, -1, right] - logits[row, -1, wrong]).mean()

    _, cache = model.run_with_cache(corrupted)
    n_layers, n_heads, n_positions = model.cfg.n_layers, model.cfg.n_heads, clean.shape[1]
    began, factor = time.perf_counter(), 1
    if part == "A":
        patching.get_act_patch_resid_pre(model, clean, cache, metric)
        cells = n_layers * n_positions
    elif part == "B":
        patching.get_act_patch_attn_head_out_all_pos(model, clean, cache, metric)
        cells = n_layers * n_heads
    else:
        import pandas

        index = list(itertools.product(range(n_layers), range(n_positions), range(n_heads)))
        cells, factor = len(index), SAMPLE
        patching.generic_activation_patch(
            model,
            clean,
            cache,
            metric,
            patching.layer_pos_head_vector_patch_setter,
            "z",
            index_df=pandas.DataFrame(index[::SAMPLE], columns=["layer", "pos", "head"]),
        )
    print(json.dumps({"seconds": (time.perf_counter() - began) * factor, "cells": cells}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Name mover heads: heads that attend to the answer where the prompt says it, and copy it to the logits.

    moved[layer, head] = mean over prompts of the sum over places p of the right answer's token
                         of A[last, p] (v_p W_O) . y

A the attention pattern, v the values, y the direction in the stream that reads right minus wrong (final norm and any
norm after attention frozen): the logits that the head takes from the answer's places to the answer. With those of all
other places these add up to the head's direct logit attribution. A negative name mover looks there and pushes the
answer down. Beside it: `moved_wrong`, from the places of the wrong answers (the subject), `elsewhere`, what as many
other places give; attention to right, wrong and first token, and `without_first`, the share of the rest that goes to
the answer; `copy`, how often the answer is among the `top` tokens that v_p W_O raises most in the whole vocabulary (a
gate after attention is left out). p flips signs prompt by prompt of moved - elsewhere; `p_adjusted` over all heads
(Benjamini-Hochberg). One forward pass.

Wang, Variengien, Conmy, Shlegeris and Steinhardt 2022, "Interpretability in the Wild" (there the copy score takes the
values of the stream after the first MLP; here, those that the prompt really has).

Only the direct path is seen: a head that moves a name for later heads scores near 0, and a mover that stands in for an
ablated one ("backup") is not told from any other. Use by the model is for `prove.ablation`.
"""

from __future__ import annotations

from patchbay import maths
from patchbay.find._chance import standard_error
from patchbay.find._movers import moved
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task


@method(paper="wang2022", unit="logits")
def name_mover_heads(model: Model, task: Task, *, top: int = 5, batch_size: int = 16) -> Result:
    """Logits that each head moves from where the right answer is said to the answer, mean over prompts.

    Every prompt must contain its right answer, as `pb.tasks.indirect_object` and `laundry_list` do. `top`: how many
    tokens the copied one may be among.
    """
    if top < 1:
        raise PatchbayError(f"top={top}: the copied token is among the 1 or more that are raised most")
    seen = moved(model, task, "name_mover_heads", top=top, batch_size=batch_size)
    p = seen.p()
    adjusted = maths.benjamini_hochberg(p)
    axes = ("layer", "head")
    score = seen.right.mean(0)
    elsewhere = seen.elsewhere.mean(0)
    clear = (score > elsewhere.clamp_min(0.0)) & (adjusted <= 0.05)
    against = (score < elsewhere.clamp_max(0.0)) & (adjusted <= 0.05)
    return Result(
        {
            "moved": (score, axes, "logits"),
            "standard_error": (standard_error(seen.right), axes, "logits"),
            "moved_wrong": (seen.wrong.mean(0), axes, "logits"),
            "elsewhere": (elsewhere, axes, "logits"),
            "attention": (seen.attention.mean(0), axes, "attention"),
            "without_first": (seen.without_first.nanmean(0), axes, "attention"),
            "attention_wrong": (seen.attention_wrong.mean(0), axes, "attention"),
            "attention_first": (seen.attention_first.mean(0), axes, "attention"),
            "copy": (seen.copies.mean(0), axes, "share of prompts"),
            "p": (p, axes, "probability"),
            "p_adjusted": (adjusted, axes, "probability"),
        },
        notes=[
            (
                f"{int(clear.sum())} heads move the answer and {int(against.sum())} push it down (adjusted p <= 0.05); "
                if maths.clear(adjusted)
                else ""
            )
            + "by chance a "
            f"head copies {min(1.0, top / model.vocab_size):.2g} of the answers (top {top} of {model.vocab_size} tokens)"
        ],
    )

"""Logit lens: what the stream would answer if the model stopped at each layer.

    logits[layer, position] = unembed(final_norm(stream after that layer))

read as the answer's probability, logit and rank, and as the divergence KL(model || lens) in nats from what the model itself
says at that position. The first row is the embedding, the last one the model itself: there the divergence is 0. Positions
count from each prompt's end, -1 the last, where the answer is asked; earlier ones show where on the way it appears. A text
alone will do: then each cell is the token that is most likely there, with its probability. One forward pass, and one unembedding of `positions` positions per layer.

nostalgebraist 2020, "interpreting GPT: the logit lens" (LessWrong).

The final norm and unembedding were trained for the last layer alone: a low probability does not show that the answer is
not there, only that it is not there in the last layer's code. A divergence that stays high until the end says so.
"""

from __future__ import annotations

from patchbay.find._lens import read
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.tasks.task import Task


@method(paper="nostalgebraist2020", unit="probability")
def logit_lens(
    model: Model,
    task: Task | str,
    *,
    answer: str | None = None,
    positions: int | None = None,
    batch_size: int = 8,
) -> Result:
    """The right answer's probability in the stream after each layer, at the last `positions` positions, mean over prompts.

    Prompts shorter than `positions` set the number of positions for all. Beside it `logit`, `rank` (0 is the top), `kl` and,
    where every prompt has wrong answers, `logit_diff`. The table `most_likely` holds the first prompt's best token everywhere.
    Of a text, the most likely token of each cell and its probability: `token_id`, and the table `cells` with the token as text.

    `task`: a task, or one text, which needs no answer. `answer`: of a text, a token whose `answer_probability`,
    `answer_logit` and `rank` are read beside it. `positions`: how many of the last positions are read; by default 8 of a task,
    all of a text.
    """
    return read(model, task, answer, positions, batch_size)

"""Claims about sparse features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import DRAWS, FEW, beyond_random, ends_of, over_sets

if TYPE_CHECKING:
    from patchbay.model.model import Model

WIDTH, K = 512, 2


@claim("ayonrinde2024", "comparison")
def ayonrinde2024(model: Model, seed: int) -> Claim:
    """Confirmed if, of a dictionary at its start, more features are kept at no token of a batch by k a token than by a number for each
    feature. What training makes of them is measured by `train.dictionary`; here is what the rule itself leaves without a gradient."""
    from patchbay.train._allocation import kept  # with torch, which looking up a claim does without
    from patchbay.train._fitting import Fitting, Plan
    from patchbay.train._places import places_of
    from patchbay.train._stream import Source

    places = places_of(model, f"L{model.n_layers // 2}.resid_out")

    def unused(at: int) -> float:
        task = pb.tasks.repeated_tokens(model, FEW, seed=at)
        ids = model.encode(task)
        read, written = Source([model], ids, places).of(range(len(ids)))
        plan = Plan("topk", WIDTH, K, 0.0, 1, 1e-3, len(read), at)
        begun = Fitting(plan, read, written, places)
        value = begun._pre(read / begun.scale_in).relu().detach()
        shares = [
            1 - float(kept(form, value, K, begun.density).any(0).double().mean()) for form in ("topk", "feature_choice")
        ]
        return shares[0] - shares[1]

    value, low, high = over_sets(unused, seed)
    return Claim(
        "more features are used at no token of a batch with k a token than with a number for each feature",
        value,
        low,
        high,
        0.0,
        "of the features",
    )


@claim("ameisen2025", "mechanism")
def ameisen2025(model: Model, seed: int) -> Claim:
    """Confirmed if the next token changes more without the neurons of attribution graphs than without as many others of their layers, each
    writing about as much at its token; prompts and random graphs both vary."""
    graph = pb.find.attribution_graph(model, pb.tasks.indirect_object(model, FEW, seed=seed), features=256)
    found = pb.prove.graph_ablation(model, graph, draws=DRAWS, matched="length", seed=seed)
    text = "the neurons of attribution graphs matter more than as many others of their layers that write as much"
    interval = ends_of(found, "difference", "difference_low", "difference_high")
    return beyond_random(text, interval, float(found["p"]), DRAWS, "nats")


@claim("schwettmann2023", "comparison")
def schwettmann2023(model: Model, seed: int) -> Claim:
    """Confirmed if a table of 17 values, read between its rows, passes the published score on more than half of the functions: passing it is then no
    sign of having understood one. Of black boxes and of no model; what a table explains is the null of `measure.function_descriptions`."""
    import numpy as np

    from patchbay.measure._black_boxes import HIGH, LOW, baselines, make, score

    del model
    asked, told = np.linspace(LOW, HIGH, 17), {"constant": [], "blind": [], "fvu": []}  # type: ignore[var-annotated]

    def passed(at: int) -> float:
        found = []
        for i in range(40):
            box = make("composed", 1000 * at + i, 0.0, 0.15)
            rivals = {name: score(box, said, asked, None) for name, said in baselines(asked, box(asked)).items()}
            found.append(rivals["table"].passes)
            told["constant"].append(rivals["constant"].passes)
            told["fvu"].append(float(rivals["constant"].fvu < 0.1))
            if box.interval is not None:
                told["blind"].append(score(box, lambda x, box=box: np.nan_to_num(box.rule(x)), asked, None).passes)  # type: ignore[misc]
        return float(np.mean(found))

    value, low, high = over_sets(passed, seed)
    share = {name: float(np.mean(row)) for name, row in told.items()}
    text = (
        "a table of 17 values passes the published score on most composed functions "
        f"(a constant on {share['constant']:.2f}, by FVU on {share['fvu']:.2f}; answers blind to a corrupted interval on {share['blind']:.2f})"
    )
    return Claim(text, value, low, high, 0.5, "of the functions")

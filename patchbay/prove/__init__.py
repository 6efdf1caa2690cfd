"""Prove: does the model use these parts? Every function intervenes, and compares with matched controls.

ablation              what is lost without the parts, against as many random parts of the same layers
acdc                  the edges that are left when all are dropped that are not missed, from the output back
activation_patching   what one run's signals, put into the other run of a pair, bring back or take away
atp_star              attribution patching with exact softmax and without cancelling: AtP*
attention_knockout    in which layers the answer needs what some tokens tell others by attention
attribution_patching  the effect of patching every site at once, estimated from one gradient
causal_scrubbing      whether a hypothesis of what parts depend on says all that matters
causal_tracing        which clean states bring the answer back to a run whose subject is noise
channel               what one component of a head tells one reader: taken away, put back, on that path alone, and how low its rank is
circuit               how much of the answer the best edges or heads carry alone, and what is left without them
cross_model_patching  what signals of a tuned model, copied into its base, bring over
das                   a learned subspace of a signal that brings a variable of another run over
desiderata_mask       the fewest heads that, taken from another run, do what is asked of them, by a learned mask
edge_attribution      the effect of corrupting every edge between two parts, estimated from gradients
fit_mechanisms        how far place, key and pointer explain the answers after an interchange
graph_ablation        what is lost without the features of an attribution graph, against random graphs
interchange           what the last token's stream holds at each depth: a place, a key, or the answer
knockout_curve        what is lost as more and more parts are taken away together, against random ones
mean_mask             the fewest neurons and heads that a task needs when all others give their mean
path_patching         what a part tells another part, or the logits, by the path between them alone
"""

from patchbay.prove.ablation import ablation
from patchbay.prove.acdc import acdc
from patchbay.prove.activation_patching import activation_patching
from patchbay.prove.atp_star import atp_star
from patchbay.prove.attention_knockout import attention_knockout
from patchbay.prove.attribution_patching import attribution_patching
from patchbay.prove.causal_scrubbing import causal_scrubbing
from patchbay.prove.causal_tracing import causal_tracing
from patchbay.prove.channel import channel
from patchbay.prove.circuit import circuit
from patchbay.prove.cross_model_patching import cross_model_patching
from patchbay.prove.das import das
from patchbay.prove.desiderata_mask import desiderata_mask
from patchbay.prove.edge_attribution import edge_attribution
from patchbay.prove.fit_mechanisms import fit_mechanisms
from patchbay.prove.graph_ablation import graph_ablation
from patchbay.prove.interchange import interchange
from patchbay.prove.knockout_curve import knockout_curve
from patchbay.prove.mean_mask import mean_mask
from patchbay.prove.path_patching import path_patching

__all__ = [
    "ablation",
    "acdc",
    "activation_patching",
    "atp_star",
    "attention_knockout",
    "attribution_patching",
    "causal_scrubbing",
    "causal_tracing",
    "channel",
    "circuit",
    "cross_model_patching",
    "das",
    "desiderata_mask",
    "edge_attribution",
    "fit_mechanisms",
    "graph_ablation",
    "interchange",
    "knockout_curve",
    "mean_mask",
    "path_patching",
]

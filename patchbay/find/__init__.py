"""Find: which parts of a model have to do with something. Every function returns a Result that ranks parts.

activation_sparsity        how many neurons the text can do without, layer by layer
arithmetic_heads           heads whose direct path carries a sum's answer, and their look at its operands
attention_sinks            heads that put their attention on the first token
attribution_graph          which features make which others, from tokens to logits
binding_heads              heads that look at the answer of the pair that is asked
channel_changes            which channels are stronger or weaker in another model of the same shape
channel_content            what a component of a part carries: tokens, places in prompts, variables
channels                   which parts are wired to which later parts, through which few dimensions
communities                groups of parts that are wired to one another more than chance
concept_depth              from which layer on a linear probe reads a property of the text
concept_neurons            neurons that respond more to one set of prompts than to another
copy_suppression_heads     heads that look back at what is about to be said, and push it down
direct_logit_attribution   what each head, neuron, expert or layer writes towards the answer
duplicate_token_heads      heads that look at earlier occurrences of their own token
expert_specialisation      which experts of a mixture fire for which behaviour
fact_heads                 heads that tip a contradicted fact towards the text or the memory
feature_names              when features and neurons fire, in words held to other texts
features                   what each feature of a dictionary adds to a task's score, estimated from one gradient
function_vectors           the heads that carry a task shown by examples, and the vector that they write
head_importance            how much each head writes, and what its removal really costs
induction_heads            heads that look at what followed this token the last time
inhibition_heads           heads that tell the movers' queries what not to look at
isotropy                   how evenly the states of a text spread over directions, by layer
jacobian_lens              what a stream is disposed to make the model say later, by mean Jacobians
key_clusters               how the tokens below the top crowd around it in the unembedding
language_similarity        how alike states of a text and its translations are, by layer
latent_language            which language's or class's tokens the layers say
logit_lens                 what the stream would answer if the model stopped at each layer
mod_features               directions of a number's remainder, and their edit
name_mover_heads           heads that attend to the answer in the prompt and copy it
neuron_importance          how active each neuron is, and what its removal really costs
neuron_vocabulary          the tokens that a neuron's weights stand for
ngram_heads                heads that look at what followed the last n tokens the last time
observable_propagation     what each head writes towards an observable, and the feature it reads
patchscopes                what the model says of a state that is written into another prompt
previous_token_heads       heads that look one position back
prior_layers               layers whose read-out follows the answer's prior probability
relation_embedding         a relation as one affine map from a subject to its answer, and its edit
relation_neurons           neurons that tell one relation's prompts from all others'
relevance                  what each token or part has of the answer by rules that conserve: RelP, AttnLRP
retrieval_heads            heads that look at the needle's token that is being said
spectrum                   heads whose circuits use fewer directions than random weights would
successor_heads            heads that send a word to the next one of its class
token_rewards              what each token is worth to a model by the reward in its logits, and what of it is not surprisal
tree_probe                 whether a low-rank subspace of a layer shows the syntax tree of the text
tuned_lens                 what the stream would answer at each layer, read by learned maps
word_classes               layers at which states cluster by the next word's class

A rank says where to look. Whether the model uses a part is for `patchbay.prove` to say.
"""

from patchbay.find.activation_sparsity import activation_sparsity
from patchbay.find.arithmetic_heads import arithmetic_heads
from patchbay.find.attention_sinks import attention_sinks
from patchbay.find.attribution_graph import attribution_graph
from patchbay.find.binding_heads import binding_heads
from patchbay.find.channel_changes import channel_changes
from patchbay.find.channel_content import channel_content
from patchbay.find.channels import channels
from patchbay.find.communities import communities
from patchbay.find.concept_depth import concept_depth
from patchbay.find.concept_neurons import concept_neurons
from patchbay.find.copy_suppression_heads import copy_suppression_heads
from patchbay.find.direct_logit_attribution import direct_logit_attribution
from patchbay.find.duplicate_token_heads import duplicate_token_heads
from patchbay.find.expert_specialisation import expert_specialisation
from patchbay.find.fact_heads import fact_heads
from patchbay.find.feature_names import feature_names
from patchbay.find.features import features
from patchbay.find.function_vectors import function_vectors
from patchbay.find.head_importance import head_importance
from patchbay.find.induction_heads import induction_heads
from patchbay.find.inhibition_heads import inhibition_heads
from patchbay.find.isotropy import isotropy
from patchbay.find.jacobian_lens import jacobian_lens
from patchbay.find.key_clusters import key_clusters
from patchbay.find.language_similarity import language_similarity
from patchbay.find.latent_language import latent_language
from patchbay.find.logit_lens import logit_lens
from patchbay.find.mod_features import mod_features
from patchbay.find.name_mover_heads import name_mover_heads
from patchbay.find.neuron_importance import neuron_importance
from patchbay.find.neuron_vocabulary import neuron_vocabulary
from patchbay.find.ngram_heads import ngram_heads
from patchbay.find.observable_propagation import observable_propagation
from patchbay.find.patchscopes import patchscopes
from patchbay.find.previous_token_heads import previous_token_heads
from patchbay.find.prior_layers import prior_layers
from patchbay.find.relation_embedding import relation_embedding
from patchbay.find.relation_neurons import relation_neurons
from patchbay.find.relevance import relevance
from patchbay.find.retrieval_heads import retrieval_heads
from patchbay.find.spectrum import spectrum
from patchbay.find.successor_heads import successor_heads
from patchbay.find.token_rewards import token_rewards
from patchbay.find.tree_probe import tree_probe
from patchbay.find.tuned_lens import tuned_lens
from patchbay.find.word_classes import word_classes

__all__ = [
    "activation_sparsity",
    "arithmetic_heads",
    "attention_sinks",
    "attribution_graph",
    "binding_heads",
    "channel_changes",
    "channel_content",
    "channels",
    "communities",
    "concept_depth",
    "concept_neurons",
    "copy_suppression_heads",
    "direct_logit_attribution",
    "duplicate_token_heads",
    "expert_specialisation",
    "fact_heads",
    "feature_names",
    "features",
    "function_vectors",
    "head_importance",
    "induction_heads",
    "inhibition_heads",
    "isotropy",
    "jacobian_lens",
    "key_clusters",
    "language_similarity",
    "latent_language",
    "logit_lens",
    "mod_features",
    "name_mover_heads",
    "neuron_importance",
    "neuron_vocabulary",
    "ngram_heads",
    "observable_propagation",
    "patchscopes",
    "previous_token_heads",
    "prior_layers",
    "relation_embedding",
    "relation_neurons",
    "relevance",
    "retrieval_heads",
    "spectrum",
    "successor_heads",
    "token_rewards",
    "tree_probe",
    "tuned_lens",
    "word_classes",
]

"""Every documented option of transformers' generate is what it is there, alone and in a batch, or is refused by name."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerationMixin

import patchbay as pb
from patchbay.knobs.rows import generate_rows
from patchbay.model.generate import HARMLESS, REFUSED
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import N_VOCAB, twin
from tests.model.test_text import tokenizer_with
from tests.shared import SHARED
from tests.shares import by_turns

IDS = torch.randint(8, N_VOCAB, (3, 6), generator=torch.Generator().manual_seed(3))
NEW = 8


def model_with(seed: int = 0) -> Model:
    return pb.load(twin("llama", seed=seed), tokenizer_with())


def plain(model: Model, ids: torch.Tensor, **options: object) -> list[list[int]]:
    """transformers' own, each prompt alone."""
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW} | options
    mask = torch.ones_like(ids[:1])
    return [model.hf.generate(row[None], attention_mask=mask, **options)[0].tolist() for row in ids]


def the_end(model: Model) -> int:
    """A token that one prompt's continuation comes to before the others'."""
    news = [row[IDS.shape[1] :] for row in plain(model, IDS)]
    return next(t for t in news[0][1:5] if any(t not in other[:6] for other in news[1:]) and t not in news[0][:1])


# --- the table ---

TAKEN = {
    "repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 2.0, "bad_words_ids": [[9], [10, 11]],
    "sequence_bias": [[[12], 30.0]], "suppress_tokens": [13, 14], "begin_suppress_tokens": [15], "forced_eos_token_id": 5,
    "min_length": 9, "min_new_tokens": 3, "num_beams": 3, "length_penalty": 0.2, "early_stopping": True,
    "exponential_decay_length_penalty": (2, 1.5), "remove_invalid_values": True, "renormalize_logits": True,
    "encoder_no_repeat_ngram_size": 2, "use_cache": False, "eos_token_id": [20, 21], "pad_token_id": 4, "forced_bos_token_id": 6,
    "prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 2, "bos_token_id": 1, "cache_implementation": "dynamic",
}  # fmt: skip
SAMPLING = {
    "temperature": 0.7, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
    "top_h": 0.5,
}  # fmt: skip
ELSEWHERE = {  # acts only with others, on other kinds of model, or how a model is run: handed on as they are
    "max_new_tokens", "do_sample", "generation_config", "cache_config", "compile_config", "disable_compile", "max_cache_len",
    "prefill_chunk_size", "max_time", "stop_strings", "stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn", "streamer",
    "assistant_model", "synced_gpus", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_early_exit", "assistant_ensemble_weight",
    "speculation_type", "use_mtp", "watermarking_config", "low_memory", "decoder_start_token_id", "continuous_batching_config",
    "num_beam_groups", "diversity_penalty", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "transformers_version",
}  # fmt: skip


def test_every_documented_option_is_in_one_of_the_tables():
    documented = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    documented |= set(GenerationConfig().__dict__) - {"_from_model_config"}
    documented |= {
        name for name in inspect.signature(GenerationMixin.generate).parameters if name not in ("self", "kwargs")
    }
    assert documented - (set(TAKEN) | set(SAMPLING) | ELSEWHERE | set(REFUSED)) == set()


@pytest.mark.parametrize(("place", "name"), by_turns(["call", "generation_config", "the model's own"], TAKEN, of=3))
def test_an_option_does_what_it_does_in_transformers(name, place):
    model, value = model_with(), TAKEN[name]
    more = {"num_beams": 2} if name in ("length_penalty", "early_stopping") else {}
    more |= {"eos_token_id": 20} if name == "exponential_decay_length_penalty" else {}
    right = [row[: len(row)] for row in plain(model, IDS, **{name: value, **more})]  # alone, so that nothing is padded
    if place == "call":
        found = model.generate(IDS, NEW, **{name: value}, **more)
    elif place == "generation_config":
        found = model.generate(IDS, NEW, generation_config=GenerationConfig(**{name: value}, **more))
    else:
        model.hf.generation_config.update(**{name: value}, **more)
        found = model.generate(IDS, NEW)
    assert found == right


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_is_done_when_the_call_asks_for_it_alone(name):
    model, value = model_with(), SAMPLING[name]
    torch.manual_seed(5)
    right = model.hf.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=True, pad_token_id=0, max_new_tokens=NEW,
                              **{name: value}).tolist()  # fmt: skip
    for options in (
        {"do_sample": True, name: value},
        {"generation_config": GenerationConfig(do_sample=True, **{name: value})},
    ):
        torch.manual_seed(5)
        assert model.generate(IDS, NEW, **options) == right
    greedy = plain(model, IDS)
    model.hf.generation_config.update(do_sample=True, **{name: value})
    assert model.generate(IDS, NEW) == greedy


@pytest.mark.parametrize(("place", "name"), by_turns(["call", "generation_config", "the model's own"], REFUSED, of=3))
def test_an_option_that_cannot_be_met_is_refused_by_name(name, place):
    model = model_with()
    value = IDS if name in ("input_ids", "inputs", "attention_mask", "position_ids") else 3
    in_config = name in GenerationConfig().__dict__
    if place != "call" and (not in_config or (place == "the model's own" and name in HARMLESS)):
        return
    options = {name: value} if place == "call" else {}
    config = GenerationConfig()
    setattr(config, name, value)
    if place == "generation_config":
        options = {"generation_config": config}
    elif place == "the model's own":
        setattr(model.hf.generation_config, name, value)
    with pytest.raises(PatchbayError, match=f"{name}=.*Model.generate does not take it"):
        model.generate(IDS, NEW, **options)


def test_what_a_models_own_config_says_of_the_form_changes_nothing():
    model = model_with()
    right = plain(model, IDS)
    model.hf.generation_config.return_dict_in_generate = True
    model.hf.generation_config.output_scores = True
    assert model.generate(IDS, NEW) == right


@pytest.mark.parametrize("place", ["call", "generation_config", "the model's own"])
@pytest.mark.parametrize("kind", ["rows", "token"])
def test_beams_and_edits_by_row_or_token_are_refused_wherever_beams_come_from(place, kind):
    model = model_with()
    where = {"rows": (1,)} if kind == "rows" else {"positions": pb.Token(9)}
    edit = pb.scale(model.port("L0.mlp.out"), 0.5, **where)
    options: dict[str, object] = {}
    if place == "call":
        options = {"num_beams": 2}
    elif place == "generation_config":
        options = {"generation_config": GenerationConfig(num_beams=2)}
    else:
        model.hf.generation_config.num_beams = 2
    with pytest.raises(PatchbayError, match="beam search .num_beams=2. reorders the batch"):
        model.generate(IDS, NEW, edits=[edit], **options)
    with pytest.raises(PatchbayError, match="beam search"), model.edited(edit):
        model.generate(IDS, NEW, **options)


def test_repetition_penalty_of_the_models_own_config_holds_under_edits_by_row():
    model = model_with()
    model.hf.generation_config.repetition_penalty = 3.0
    knobs = [None, pb.add(model.port("L0.mlp.out"), 0.3 * torch.ones(model.d_model)), None]
    found = generate_rows(model, IDS, knobs, NEW)
    for row, knob, ids in zip(found, knobs, IDS, strict=True):
        assert row == model.generate(ids[None], NEW, edits=[knob] if knob else [])[0]
    assert found != plain(model, IDS, repetition_penalty=1.0)


def test_the_number_of_new_tokens_comes_from_where_it_is_said():
    model = model_with()
    assert len(model.generate(IDS[0])) == 6 + 20
    assert len(model.generate(IDS[0], generation_config=GenerationConfig(max_new_tokens=3))) == 9
    assert len(model.generate(IDS[0], 2, generation_config=GenerationConfig(max_new_tokens=3))) == 8
    model.hf.generation_config.max_new_tokens = 4
    assert len(model.generate(IDS[0])) == 10
    with pytest.raises(PatchbayError, match="max_new_tokens=0"):
        model.generate(IDS[0], 0)


def test_a_generation_config_that_is_lent_is_not_changed():
    model, config = model_with(), GenerationConfig(top_k=3)
    before, own = copy.deepcopy(config.to_dict()), copy.deepcopy(model.hf.generation_config.to_dict())
    model.generate(IDS, NEW, generation_config=config, repetition_penalty=2.0)
    assert config.to_dict() == before
    assert model.hf.generation_config.to_dict() == own


# --- rows that end early ---


@pytest.mark.parametrize("place", ["call", "generation_config", "the model's own"])
def test_rows_that_end_early_come_back_as_each_alone(place):
    model = model_with()
    end = the_end(model)
    right = plain(model, IDS, eos_token_id=end)
    assert len({len(row) for row in right}) > 1
    options: dict[str, object] = {}
    if place == "call":
        options = {"eos_token_id": end}
    elif place == "generation_config":
        options = {"generation_config": GenerationConfig(eos_token_id=[end, 0])}
    else:
        model.hf.generation_config.eos_token_id = end
    assert model.generate(IDS, NEW, **options) == right
    assert generate_rows(model, IDS, [None] * 3, NEW, **options) == right


def test_new_tokens_of_a_row_that_ended_are_not_told():
    model = model_with()
    end = the_end(model)
    told: dict[int, list[int]] = {}
    found = generate_rows(
        model, IDS, [None] * 3, NEW, note=lambda row, token: told.setdefault(row, []).append(token), eos_token_id=end
    )
    assert [told[i] for i in range(3)] == [row[6:] for row in found]


@pytest.mark.skipif(not (SHARED / "models/stories260K").is_dir(), reason=f"no {SHARED / 'models/stories260K'}")
def test_stop_strings_use_the_models_tokenizer_and_rows_stop_alone():
    model = pb.load(SHARED / "models/stories260K")
    prompts = ["Once upon a time, there was", "The cat sat on", "One day Mary went to the"]
    plain_texts = [model.generate(prompt, 12, new_only=True) for prompt in prompts]
    stop = next(word for word in plain_texts[0].split()[1:6] if any(word not in text for text in plain_texts[1:]))
    right = []
    for prompt in prompts:
        ids = torch.tensor(model.encode(prompt))
        row = model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                                stop_strings=[stop], tokenizer=model.tokenizer)  # fmt: skip
        right.append(model.tokenizer.decode(row[0], skip_special_tokens=True))  # type: ignore[union-attr]
    assert model.generate(prompts, 12, stop_strings=[stop]) == right
    assert model.generate(prompts, 12, generation_config=GenerationConfig(stop_strings=stop)) == right
    assert right[0].endswith(stop)
    assert len(right[0]) < len(prompts[0] + plain_texts[0])


def test_criteria_and_allowed_tokens_of_the_user_see_each_prompt_by_its_place():
    model = model_with()
    prompts = [IDS[0].tolist(), IDS[1, :4].tolist(), IDS[2].tolist()]
    found = model.generate(prompts, 3, prefix_allowed_tokens_fn=lambda row, ids: [10 + row])
    assert [row[len(ids) :] for row, ids in zip(found, prompts, strict=True)] == [[10] * 3, [11] * 3, [12] * 3]
    two_new = StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), bool(ids[0, -2] == 10))])
    stopped = model.generate(
        prompts, 6, stopping_criteria=two_new, prefix_allowed_tokens_fn=lambda row, ids: [10 + row]
    )
    assert [len(row) - len(ids) for row, ids in zip(stopped, prompts, strict=True)] == [2, 6, 6]
    by_row = pb.scale(model.port("L0.mlp.out"), 0.5, rows=(1,))
    with pytest.raises(PatchbayError, match=r"rows=\[1\].* give it as edits= of this call"), model.edited(by_row):
        model.generate(IDS, 3, stopping_criteria=two_new)


def test_new_only_leaves_the_prompt_off():
    model = model_with()
    assert model.generate(IDS, NEW, new_only=True) == [row[6:] for row in plain(model, IDS)]
    tiny = pb.load("tiny")
    prompt = "The capital of Lolavia is"
    whole, new = tiny.generate(prompt, 3), tiny.generate(prompt, 3, new_only=True)
    assert whole == prompt + new
    assert tiny.generate([prompt], 3, new_only=True) == [new]
    assert generate_rows(tiny, [prompt], [None], 3, new_only=True) == [new]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}, {"logits_processor": [lambda ids, scores: scores.nan_to_num()]}], ids=["greedy", "beams", "drawn", "processed"])  # fmt: skip
def test_logits_that_are_no_numbers_are_refused_by_prompt(options: dict[str, object]) -> None:
    """A token "chosen" from NaN is the first or the last of the vocabulary. What another processor would make of it is no text either."""
    model, prompts = model_with(), [[5, 6], [7, 8, 9], [9, 8]]
    too_far = pb.scale("L0.attn.out", 3e38, rows=(2,)) if "num_beams" not in options else pb.scale("L0.attn.out", 3e38)
    said = f"prompt {0 if 'num_beams' in options else 2}: the model gives logits that are no numbers"
    with pytest.raises(PatchbayError, match=said):
        model.generate(prompts, 3, edits=[too_far], **options)
    assert len(model.generate(prompts, 3, **options)) == 3

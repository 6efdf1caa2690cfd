"""Prompts in every form become the ids that the tokenizer itself would give, each form refused where it says something else."""

from __future__ import annotations

import warnings

import numpy as np
import pandas
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

import patchbay as pb
from patchbay.model.model import Model
from patchbay.model.text import longest_prompt
from patchbay.signal.port import PatchbayError
from patchbay.tiny.twins import N_VOCAB, twin
from tests.shared import SHARED

WORDS = ["the", "sky", "sea", "is", "blue", "green", "grey", "The", "user", "assistant", ":", ",", ".", "a"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} :{{ ' ' + m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
ASKED = [{"role": "user", "content": "the sky is"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "blue"}]


def tokenizer_with(
    *, start: bool = True, end: bool = False, pad: str | None = "<pad>", template: str | None = TEMPLATE
) -> PreTrainedTokenizerFast:
    """Words with their space; a start token in front and an end token behind by default where asked."""
    special = ["<s>", "</s>", "<unk>", "<pad>"]
    ids = {token: i for i, token in enumerate([*special, *WORDS, *(f" {word}" for word in WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[^\sA-Za-z]|\s"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    whole = f"{'<s> ' * start}$A{' </s>' * end}"
    tokenizer.post_processor = processors.TemplateProcessing(single=whole, special_tokens=[("<s>", 0), ("</s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = template
    return made


def model_with(**options: object) -> Model:
    return pb.load(twin("llama"), tokenizer_with(**options))  # type: ignore[arg-type]


def spelled(model: Model, *pieces: str) -> list[int]:
    return [int(token) for token in model.tokenizer.convert_tokens_to_ids(list(pieces))]  # type: ignore[union-attr]


# --- chat and start tokens ---


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("messages", [ASKED, ANSWERED])
def test_chat_messages_are_what_the_template_gives_with_one_start_token(start, end, messages):
    model = model_with(start=start, end=end)
    ask = messages is ASKED
    right = model.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
    assert right.count(0) == 1
    assert model.encode(messages) == [right]
    assert model.encode([messages, messages]) == [right, right]
    assert model.encode(pandas.Series([messages])) == [right]
    written = model.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
    assert model.encode(written) == [right]  # an end token that the text itself holds stays
    assert model.encode([written, "the sky"])[0] == right
    assert torch.equal(pb.run(model, messages).logits[0], model.hf(torch.tensor([right])).logits[0])


def test_a_template_that_writes_no_start_token_gets_none():
    model = model_with(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    right = model.tokenizer.apply_chat_template(ASKED, return_dict=False)
    assert 0 not in right
    assert model.encode(ASKED) == [right]


def test_what_the_tokenizer_returns_for_a_chat_is_a_prompt():
    model = model_with()
    made = model.tokenizer.apply_chat_template([ASKED, ANSWERED], padding=True, return_dict=True, return_tensors="pt")
    assert [len(ids) for ids in model.encode(made)] == made["attention_mask"].sum(1).tolist()
    flat = model.tokenizer.apply_chat_template(ASKED, return_dict=True)
    assert model.encode(flat) == [flat["input_ids"]]
    assert isinstance(model.generate(flat, 2)[0], int)  # one in, one out


def test_generation_and_tasks_put_one_start_token_before_template_text():
    model = model_with()
    written = model.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    ids = model.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    plain = model.hf.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=3)[0].tolist()
    said = model.tokenizer.decode(plain, skip_special_tokens=True)
    assert model.generate(written, 4) == model.generate(ASKED, 4) == said
    assert model.generate([ASKED], 4) == [said]
    task = pb.Task.from_prompts(model, [written, ASKED], [" blue", " blue"], [" green", " grey"])
    assert [list(prompt) for prompt in task.clean] == [ids, ids]


def test_chats_that_cannot_be_read_are_refused():
    with pytest.raises(PatchbayError, match="this one has none: set tokenizer.chat_template"):
        model_with(template=None).encode(ASKED)
    model = model_with(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PatchbayError, match="refuses these messages: roles must alternate"):
        model.encode(ASKED)
    with pytest.raises(PatchbayError, match="message 0 of a chat has 'role' and 'content', got {'text': 'x'}"):
        model_with().encode([{"text": "x"}])
    with pytest.raises(PatchbayError, match="not some of each"):
        model_with().encode(["the sky", [1, 2]])


def test_an_appended_end_token_is_left_off_everywhere():
    model = model_with(end=True)
    right = [[0, *spelled(model, "the", " sky")]]
    assert model.encode("the sky") == right
    assert [list(ids) for ids in pb.Task.from_prompts(model, ["the sky"], [" is"]).clean] == right
    assert model.encode("the sky</s>") == [[*right[0], 1]]  # one that the text spells stays


# --- ids ---


def test_arrays_columns_and_tensors_are_prompts():
    model = model_with()
    ids = [[5, 6, 7], [8, 9, 10]]
    forms = (ids, np.array(ids), torch.tensor(ids), [np.array(row) for row in ids], [torch.tensor(row) for row in ids],
             tuple(map(tuple, ids)), np.array(ids, dtype=np.uint16), pandas.Series(ids), pandas.DataFrame(ids).to_numpy(),
             [[np.int64(token) for token in row] for row in ids], [list(torch.tensor(row)) for row in ids])  # fmt: skip
    for form in forms:
        assert model.encode(form) == ids
    texts = ["the sky", "the sea is"]
    for column in (pandas.Series(texts), np.array(texts), pandas.Series(texts, index=[7, 3]), tuple(texts)):
        assert model.encode(column) == model.encode(texts)
        assert isinstance(model.generate(column, 1)[0], str)
    assert model.encode(np.array([5, 6])) == model.encode(torch.tensor([5, 6])) == [[5, 6]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_taken_off(side):
    model = model_with()
    texts = ["the sky is", "the", "sea is blue"]
    right = model.encode(texts)
    model.tokenizer.padding_side = side
    for tensors in ("pt", "np", None):
        made = model.tokenizer(texts, padding=True, return_tensors=tensors)
        assert len({len(row) for row in made["input_ids"]}) == 1
        assert model.encode(made) == model.encode(dict(made)) == right
        if tensors is None:  # lists of ids are taken as they are
            assert model.encode(made["input_ids"]) == made["input_ids"]
            continue
        assert model.encode(made["input_ids"]) == right  # its padding token has no other use
        _, lengths, ragged = model.batch(made["input_ids"])
        assert ragged
        assert lengths.tolist() == [len(row) for row in right]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_may_be_an_end_token_is_asked_about(side):
    model = model_with(pad="</s>")
    model.tokenizer.padding_side = side
    made = model.tokenizer(["the sky is", "the"], padding=True, return_tensors="pt")
    assert model.encode(made) == model.encode(["the sky is", "the"])
    with pytest.raises(PatchbayError, match=r"prompt 1 has 2 tokens 1 at its ends and others have fewer: padding, or"):
        model.encode(made["input_ids"])
    same = torch.tensor([[1, 5, 6], [1, 6, 7]])
    assert model.encode(same) == same.tolist()  # a start of all


@pytest.mark.parametrize(
    "floats",
    [torch.tensor([[5.0, 6.7]]), np.array([5.0, 6.7]), [[5.0, 6.7]], [5.0, 6.7], [[5, 6.7]], [5, 6.7], [torch.tensor([5.5])],
     torch.tensor([[True, False]]), BatchEncoding({"input_ids": [[5.5]]})],
)  # fmt: skip
def test_ids_that_are_no_whole_numbers_are_refused(floats):
    with pytest.raises(PatchbayError, match="token ids are whole numbers"):
        model_with().encode(floats)


def test_what_is_no_prompt_is_refused_by_name():
    model = model_with()
    frame = pandas.DataFrame({"text": ["the"], "answer": ["sky"]})
    for wrong, says in (
        (frame, "got a table: name the column, one of text, answer"),
        (None, "got NoneType"),
        (b"the sky", "got bytes"),
        ({"prompt": "the"}, "got a mapping with prompt"),
        ([None], "prompt 0 is NoneType"),
        ([], "no prompts"),
        (pandas.Series([], dtype=object), "no prompts"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "differ in shape"),
        ({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 0, 1]]}, "leaves out tokens between others"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, "prompt 0 is empty"),
    ):
        with pytest.raises(PatchbayError, match=says):
            model.encode(wrong)


# --- what a tokenizer does not know ---


def test_unknown_text_is_never_taken_without_a_word():
    model = model_with()
    with pytest.warns(UserWarning, match=r"prompt 1 holds 1 tokens '<unk>'.* does not know: ' purple'"):
        assert model.encode(["the sky", "the purple sky"])[1].count(2) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.encode("the<unk>")[0][-1] == 2  # the text spells it
    edit = pb.zero(model.port("L0.mlp.out"), positions=pb.Token("purple"))
    for ask in (lambda: model.token_id("purple"), lambda: pb.run(model, "the", edits=[edit])):
        with pytest.raises(PatchbayError, match="the tokenizer does not know 'purple' of 'purple'"):
            ask()
    with pytest.raises(PatchbayError, match="an answer must be one known token|does not know"):
        pb.Task.from_prompts(model, ["the sky is"], [" purple"])
    assert model.token_id("<unk>") == 2


@pytest.mark.skipif(not (SHARED / "models/stories260K").is_dir(), reason=f"no {SHARED / 'models/stories260K'}")
def test_a_piece_that_a_space_is_put_before_is_named():
    model = pb.load(SHARED / "models/stories260K")
    number = model.tokenizer.convert_tokens_to_ids(",")
    with pytest.raises(PatchbayError, match=rf"is 2 tokens .*can be named by their ids: ',' is {number}"):
        model.token_id(",")


# --- length ---

SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", SCALED)
def test_prompts_go_past_the_trained_length_where_positions_are_scaled(kind):
    model = pb.load(twin("llama", max_position_embeddings=16, rope_parameters=SCALED[kind]))
    ids = torch.randint(8, N_VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = model.hf(ids).logits
    assert torch.equal(pb.run(model, ids).logits, right)
    assert model.generate(ids, 4) == model.hf.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()


def test_other_positions_end_where_the_config_says():
    model = pb.load(twin("llama", max_position_embeddings=16))
    with pytest.raises(PatchbayError, match="prompt 0 has 17 tokens, the model takes 16"):
        model.encode(torch.full((1, 17), 9))
    with pytest.raises(PatchbayError, match="the model takes 16 in all"):
        model.generate([[9] * 14], 4)
    assert longest_prompt(twin("falcon", alibi=True, max_position_embeddings=16).config) is None
    assert longest_prompt(twin("gpt2", n_positions=16).config) == 16
    mpt = pb.load(twin("mpt"))  # distances again, but from a table
    assert mpt.longest_prompt == mpt.config.max_seq_len
    with pytest.raises(PatchbayError, match=f"{mpt.config.max_seq_len}"):
        pb.run(mpt, [[5] * (mpt.config.max_seq_len + 1)])

"""Conversations as ids: by chat templates in the forms that families have, and without one."""

import pickle

import pytest
import torch

from uniflow.unifluid import answer
from uniflow.unifluid.conversations import (
    PICTURE,
    Turn,
    about_a_picture,
    conversation_ids,
    end_tokens,
    question_ids,
)
from uniflow.unifluid.slots import FEATURES, picture_slots
from uniflow.unifluid.texts import make_text_tokenizer, padded, text_ids

transformers = pytest.importorskip("transformers")

# in the form of Qwen 3's: thoughts, none if told so, stand before the last answer alone
THINKING = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# of Gemma's: bos first, other names of roles, no system prompt, an end that is not eos
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# of Llama 2's: spaces around what is said, eos behind answers
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %}"
    "{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
TALK = [
    Turn("user", f"{PICTURE}which digit?"),
    Turn("assistant", "seven"),
    Turn("user", f"and {PICTURE} or {PICTURE}?"),
    Turn("assistant", "a three"),
]


@pytest.fixture(scope="module")
def plain():
    return make_text_tokenizer(["a seven", "which digit?"], 280)


@pytest.fixture(scope="module")
def templated(plain):
    def make(template):
        tokenizer = pickle.loads(pickle.dumps(plain))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
        return tokenizer

    return make


def said(tokenizer, ids):
    """What ids say, a picture's two slots as one character."""
    text, number = "", 0
    while number < len(ids):
        if ids[number] == FEATURES:
            assert ids[number : number + 2] == [FEATURES] * 2
            text, number = text + PICTURE, number + 2
        else:
            text, number = text + tokenizer.decode(ids[number : number + 1]), number + 1
    return text


@pytest.mark.parametrize(
    ("template", "whole", "answers"),
    [
        (
            THINKING,
            "<|im_start|>user\n%which digit?<|im_end|>\n<|im_start|>assistant\nseven<|im_end|>\n"
            "<|im_start|>user\nand % or %?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            "a three<|im_end|>\n",
            ["seven<|im_end|>", "a three<|im_end|>"],
        ),
        (
            GEMMA,
            "<bos><|im_start|>user\n%which digit?<|im_end|>\n<|im_start|>model\nseven<|im_end|>\n"
            "<|im_start|>user\nand % or %?<|im_end|>\n<|im_start|>model\na three<|im_end|>\n",
            ["seven<|im_end|>", "a three<|im_end|>"],
        ),
        (
            LLAMA2,
            "<bos>[INST] %which digit? [/INST] seven <eos><bos>[INST] and % or %? [/INST] a three <eos>",
            [" seven <eos>", " a three <eos>"],
        ),
        (None, "%<bos>which digit?<eos>seven<eos>and % or %?<eos>a three<eos>", ["seven<eos>", "a three<eos>"]),
    ],
    ids=["thinking", "gemma", "llama2", "plain"],
)
def test_several_turns_with_pictures_between_them(plain, templated, template, whole, answers):
    tokenizer = plain if template is None else templated(template)
    ids, predicted = conversation_ids(tokenizer, TALK, [picture_slots(2)] * 3)
    assert said(tokenizer, ids) == whole.replace("%", PICTURE)
    runs, before = [], False
    for number, marked in zip(ids, predicted, strict=True):
        if marked and not before:
            runs.append([])
        if marked:
            runs[-1].append(number)
        before = marked
    assert [said(tokenizer, run) for run in runs] == answers
    # and a question is what stands before the last answer
    asked = question_ids(tokenizer, TALK[:-1], [picture_slots(2)] * 3)
    assert asked == ids[: len(ids) - 1 - predicted[::-1].index(True) - len(runs[-1]) + 1]


def test_system_prompts(plain, templated):
    turns = about_a_picture("which digit?", system="Answer in a word.")
    text = said(templated(THINKING), question_ids(templated(THINKING), turns, [picture_slots(2)]))
    assert text.startswith("<|im_start|>system\nAnswer in a word.<|im_end|>\n<|im_start|>user\n")
    with pytest.raises(ValueError, match="has no such conversation: System role not supported"):
        question_ids(templated(GEMMA), turns, [picture_slots(2)])
    with pytest.raises(ValueError, match="a system prompt needs a tokenizer with a chat template"):
        question_ids(plain, turns, [picture_slots(2)])


def test_a_text_that_spells_a_special_token_does_not_become_one(plain, templated):
    turns = about_a_picture("a <|im_end|> b")
    with pytest.raises(ValueError, match=r"spells no special token of the tokenizer, got .*im_end"):
        question_ids(templated(THINKING), turns, [picture_slots(2)])
    ids = question_ids(plain, about_a_picture("a <eos> b"), [picture_slots(2)])
    assert ids == [FEATURES] * 2 + [plain.bos_token_id, *text_ids(plain, "a <eos> b"), plain.eos_token_id]
    assert ids.count(plain.eos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends an answer by a special token"),
        ("{{ nothing.at.all }}", "has no such conversation: 'nothing' is undefined"),
        (GEMMA.replace("m.content | trim", "m.content[1:]"), "does not leave|leaves pictures"),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}<|im_end|>{% endfor %}", "does not leave"),
        ("{{ messages[0].content }}yes<|im_end|>", "does not leave a conversation"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_on(templated, template, message):
    with pytest.raises(ValueError, match=message):
        conversation_ids(templated(template), TALK, [picture_slots(2)] * 3)


def test_turns_that_are_no_conversation(plain):
    for turns, message in (
        ([], "user and assistant in turns"),
        (TALK[1:], "got assistant, user, assistant"),
        ([TALK[0], TALK[0]], "got user, user"),
        ([TALK[0], Turn("system", "x")], "got user, system"),
    ):
        with pytest.raises(ValueError, match=message):
            question_ids(plain, turns, [])
    with pytest.raises(ValueError, match="the user to speak last"):
        question_ids(plain, TALK, [])
    with pytest.raises(ValueError, match="the assistant to speak last"):
        conversation_ids(plain, TALK[:1], [])


def test_answers_end_where_the_template_ends_them(plain, templated, make_model, monkeypatch):
    assert end_tokens(plain) == [plain.eos_token_id]
    for template, token in ((GEMMA, "<|im_end|>"), (THINKING, "<|im_end|>"), (LLAMA2, None)):
        tokenizer = templated(template)
        more = [] if token is None else [tokenizer.convert_tokens_to_ids(token)]
        assert end_tokens(tokenizer) == [tokenizer.eos_token_id, *more]
    tokenizer, model = templated(THINKING), make_model()
    model.text_tokenizer = tokenizer
    given = {}
    monkeypatch.setattr(model.backbone, "generate", lambda **how: given.update(how) or torch.zeros(1, 1).long())
    prompt = padded([question_ids(tokenizer, TALK[:1], [picture_slots(2)])], tokenizer)
    answer(model, torch.randn(1, 2, 7), *prompt, longest=4)
    assert given["eos_token_id"] == end_tokens(tokenizer)

"""Conversations about pictures as ids: questions, answers, system prompts, by the tokenizer's chat template.

A tokenizer without a template has its turns one after the other, each ended by eos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from uniflow.foreign import short_reason
from uniflow.reading import shown
from uniflow.unifluid.texts import begin_ids, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PICTURE = "\ufffc"  # stands in a text where a picture stands: Unicode's object replacement character
Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


class Turn(NamedTuple):
    """What someone says; each `PICTURE` in the text is one of the pictures, in their order."""

    role: Role
    text: str


def about_a_picture(question: str, answer: str | None = None, system: str | None = None) -> list[Turn]:
    """A question about a picture, which stands before it; with its answer and a system prompt if there are any."""
    turns = [Turn("system", system)] if system else []
    return [*turns, Turn("user", PICTURE + question), *([] if answer is None else [Turn("assistant", answer)])]


def check_turns(turns: Sequence[Turn]) -> None:
    """Raise a ValueError unless user and assistant take turns, the user first, after at most one system prompt."""
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or any(role != ROLES[1 + place % 2] for place, role in enumerate(spoken)):
        raise ValueError(f"expected user and assistant in turns, after a system prompt if any, got {', '.join(roles)}")


def question_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], pictures: Sequence[Sequence[int]]
) -> list[int]:
    """What an answer follows.

    Args:
        tokenizer: with a chat template, or plain: then each turn is ended by eos, and bos stands before the first text.
        turns: the last is the user's.
        pictures: the slots of each picture, in their order, see `uniflow.unifluid.slots`.

    Raises:
        ValueError: for turns that are no conversation, or that the template cannot have, such as a system prompt
            without a template; for slots of more or fewer pictures than the turns have; for texts that spell one of the
            tokenizer's special tokens, which would become one.
    """
    _check(turns, pictures, "user")
    slots = iter(pictures)
    if tokenizer.chat_template is None:
        return _plain(tokenizer, turns, slots)[0]
    whole = _rendered(tokenizer, turns, True)
    _check_pictures(whole, pictures)
    return _pieces(tokenizer, whole, slots)


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], pictures: Sequence[Sequence[int]]
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation that the assistant ends, and which of them are to be predicted: its answers.

    The token that ends an answer is a part of it. Arguments and errors as of `question_ids`; a template must also end
    answers by a special token, and leave what stands before an answer as it is when more follows.
    """
    _check(turns, pictures, "assistant")
    slots = iter(pictures)
    if tokenizer.chat_template is None:
        return _plain(tokenizer, turns, slots)
    whole, (end, _) = _rendered(tokenizer, turns, False), _answer_end(tokenizer)
    ids: list[int] = []
    predicted: list[bool] = []

    def add(text: str, answers: bool) -> None:
        found = _pieces(tokenizer, text, slots)
        ids.extend(found)
        predicted.extend([answers] * len(found))

    done = 0
    for place, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        # some templates have room for thoughts before an answer: none, where they can be told so
        prompts = (_rendered(tokenizer, turns[:place], True, thinking) for thinking in (False, True))
        start = next((len(prompt) for prompt in prompts if whole.startswith(prompt)), -1)
        text = turn.text.strip()
        stop = whole.find(text, start) + len(text)
        if start < 0 or stop < start + len(text) or not whole.startswith(end, stop):
            raise ValueError("the tokenizer's chat template does not leave a conversation as it is when it goes on")
        stop += len(end)
        add(whole[done:start], False)
        add(whole[start:stop], True)
        done = stop
    add(whole[done:], False)
    _check_pictures(whole, pictures)
    return ids, predicted


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: eos, and what the chat template ends it by."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None and (other := _answer_end(tokenizer)[1]) not in ends:
        ends.append(other)
    return ends


def _check(turns: Sequence[Turn], pictures: Sequence[Sequence[int]], last: Role) -> None:
    check_turns(turns)
    if turns[-1].role != last:
        raise ValueError(f"expected the {last} to speak last")
    wanted = sum(turn.text.count(PICTURE) for turn in turns)
    if len(pictures) != wanted:
        raise ValueError(
            f"pictures: expected slots of each that the turns have, {wanted}, got those of {len(pictures)}"
        )


def _plain(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], slots: Iterator[Sequence[int]]
) -> tuple[list[int], list[bool]]:
    """Turns one after the other, each ended by eos, bos before the first text."""
    if turns[0].role == "system":
        raise ValueError("a system prompt needs a tokenizer with a chat template")
    ids: list[int] = []
    predicted: list[bool] = []
    begin = begin_ids(tokenizer)
    for turn in turns:
        before = len(ids)
        for place, piece in enumerate(turn.text.split(PICTURE)):
            ids.extend(next(slots) if place else ())
            if piece:
                ids.extend([*begin, *text_ids(tokenizer, piece)])
                begin = []
        ids.append(tokenizer.eos_token_id)
        predicted.extend([turn.role == "assistant"] * (len(ids) - before))
    return ids, predicted


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], asked: bool, thinking: bool = False) -> str:
    """The conversation as the template writes it; where an answer is asked for, up to where it begins."""
    for turn in turns:
        plain = tokenizer(turn.text, add_special_tokens=False, split_special_tokens=True).input_ids
        if tokenizer(turn.text, add_special_tokens=False).input_ids != plain:
            raise ValueError(f"expected a text that spells no special token of the tokenizer, got {shown(turn.text)}")
    messages: Any = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asked, enable_thinking=thinking
            )
        )
    except Exception as error:  # a template raises whatever it wants
        raise ValueError(f"the tokenizer's chat template has no such conversation: {short_reason(error)}") from None


def _answer_end(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """What the template writes behind an answer, up to the first special token, and the id of that."""
    answer = "yes"
    whole = _rendered(tokenizer, [Turn("user", "is it?"), Turn("assistant", answer)], False)
    behind = whole[whole.rfind(answer) + len(answer) :]
    special = tokenizer.added_tokens_decoder
    for number in tokenizer(behind, add_special_tokens=False).input_ids:
        if number in special:
            token = special[number].content
            return behind[: behind.index(token) + len(token)], number
    raise ValueError("expected a chat template that ends an answer by a special token")


def _check_pictures(text: str, pictures: Sequence[Sequence[int]]) -> None:
    if text.count(PICTURE) != len(pictures):
        raise ValueError("the tokenizer's chat template leaves pictures out, or repeats them")


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, slots: Iterator[Sequence[int]]) -> list[int]:
    """The ids of what a template wrote, with the slots of the next pictures in their places."""
    ids: list[int] = []
    for place, piece in enumerate(text.split(PICTURE)):
        ids.extend(next(slots, ()) if place else ())
        ids.extend(tokenizer(piece, add_special_tokens=False).input_ids)
    return ids

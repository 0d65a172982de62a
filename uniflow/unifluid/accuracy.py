"""Whether an answer is right: letter for letter, as visual question answering counts it, and of several choices."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`?!,]")


def exact_match(response: str, answers: Sequence[str]) -> float:
    """1 if the response is one of the answers, letter for letter but for spaces at the ends and several in a row."""
    return float(" ".join(response.split()) in {" ".join(answer.split()) for answer in answers})


def vqa_accuracy(response: str, answers: Sequence[str]) -> float:
    """How many people gave this answer, as VQA counts it: min(1, n / 3), n of all but one, averaged over that one.

    Both sides are brought to one form, see `plain`. A single answer stands for people who all agree: it is 1 or 0.

    Source: Antol et al., "VQA: Visual Question Answering" (2015), and its evaluation of ten answers, which leaves texts
    as they are where all ten are the same.
    """
    given, said = plain(response), [plain(answer) for answer in answers]
    agreeing = said.count(given)
    if len(said) == 1:
        return float(agreeing)
    # left out is one that agrees, or one that does not
    with_one_less, with_all = min(1.0, (agreeing - 1) / 3), min(1.0, agreeing / 3)
    return (agreeing * with_one_less + (len(said) - agreeing) * with_all) / len(said)


def plain(text: str) -> str:
    """A text in lower case, without articles, apostrophes and punctuation, numbers up to ten in digits.

    "The T-shirt's two pockets, please." -> "t shirts 2 pockets please". Colons and points between digits stay ("10:30",
    "1.5"), commas between digits go ("1,000" -> "1000").
    """
    text = text.lower().replace("'", "").replace("\u2019", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    words = _PUNCTUATION.sub(" ", text).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)

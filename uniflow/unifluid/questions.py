"""Questions about pictures in a file of JSON lines, with the answers or choices by which responses are scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniflow.reading import shown
from uniflow.unifluid.captions import CaptionError, picture_of, read_lines, text_of

RESPONSE, LIKELIHOODS = "response", "likelihoods"


@dataclass(frozen=True)
class Question:
    """A line of a file.

    Attributes:
        where: it stands.
        picture: the file.
        text: the question.
        answers: that are right: one, or those of several people; none where nobody knows.
        choices: of which one is to be chosen, if there are any; the answer is then one of them.
        fields: all that the line holds.
    """

    where: str
    picture: Path
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    fields: dict[str, Any]

    @property
    def response(self) -> str | None:
        """What was answered, in a file of responses; None if the picture could not be read.

        Raises:
            CaptionError: if the line has none.
        """
        if RESPONSE not in self.fields:
            raise CaptionError(f"{self.where}: no {RESPONSE}, expected what `uniflow unifluid ask` wrote")
        given = self.fields[RESPONSE]
        if not (given is None or isinstance(given, str)):
            raise CaptionError(f"{self.where}: {RESPONSE}: expected a text or null, got {shown(given)}")
        return given

    @property
    def likelihoods(self) -> list[float]:
        """The logarithms of the likelihoods of the choices, in a file of responses.

        Raises:
            CaptionError: if the line has not one for each choice.
        """
        given = self.fields.get(LIKELIHOODS)
        numbers = [float(each) for each in given if type(each) in (int, float)] if isinstance(given, list) else []
        if not len(numbers) == len(self.choices) == len(given or ()):
            raise CaptionError(f"{self.where}: {LIKELIHOODS}: expected a number for each choice, got {shown(given)}")
        return numbers


def read_questions(file: Path) -> list[Question]:
    """The lines of a file: {"image": "a.png", "question": "which digit?"}, and what they are scored by.

    `answer` is a text; `answers`, in its place, a list of those of several people; `choices` a list of texts, of which
    `answer`, if it is there, is one. Other fields are kept. Pictures are given relative to the file's folder.

    Raises:
        FileNotFoundError: if there is no such file.
        CaptionError: for a line that is no such object, or whose picture is not there or outside the folder; if there
            are no lines.
    """
    found = [_question(fields, file.parent, where) for where, fields in read_lines(file)]
    if not found:
        raise CaptionError(f"{file} holds no questions")
    return found


def _question(fields: dict[str, Any], folder: Path, where: str) -> Question:
    picture = picture_of(folder, "image", fields.get("image"), where)
    text = text_of(fields.get("question"), "question", where, required=True)
    answer = text_of(fields.get("answer"), "answer", where)
    answers, choices = (_texts(fields, name, where) for name in ("answers", "choices"))
    if answer and answers:
        raise CaptionError(f"{where}: expected either answer or answers")
    if choices and (answers or (answer and answer not in choices)):
        raise CaptionError(f"{where}: choices: expected an answer that is one of them, got {shown(answers or answer)}")
    if len(set(choices)) < len(choices) or len(choices) == 1:
        raise CaptionError(f"{where}: choices: expected several texts, all different, got {shown(list(choices))}")
    return Question(where, picture, text, (answer,) if answer else answers, choices, fields)


def _texts(fields: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = fields.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or not values:
        raise CaptionError(f"{where}: {name}: expected a list of texts, got {shown(values)}")
    return tuple(text_of(value, name, where, required=True) for value in values)

"""Files of questions: what they hold, responses to them by a command, and scores that are counted by hand."""

import json
import math
import sys
from collections import Counter

import pytest
import torch

from tests.conftest import smooth_picture
from tests.uniflow.test_cli import fails, ok
from tests.uniflow.training import two
from uniflow.cli import main
from uniflow.normalization import normalize
from uniflow.pictures import center_crop, open_picture, to_tensor
from uniflow.unifluid import UniFluid, answer
from uniflow.unifluid.accuracy import exact_match, plain, vqa_accuracy
from uniflow.unifluid.asking import log_likelihoods
from uniflow.unifluid.captions import CaptionError
from uniflow.unifluid.conversations import about_a_picture
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.questions import read_questions
from uniflow.unifluid.texts import padded


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  The T-shirt's two\npockets, please.", "t shirts 2 pockets please"),
        ("1,000.50", "1000.50"),
        ("10:30 a.m.", "10:30 am"),
        ("None", "0"),
        ("don\u2019t know!", "dont know"),
        ("a", ""),
    ],
)
def test_the_plain_form(text, form):
    assert plain(text) == form


@pytest.mark.parametrize("response", ["Two", "red", "blue", "cat", "none of these"])
def test_vqa_accuracy_leaves_out_each_in_turn(response):
    answers = ["two", "2", "The red", "red", "red", "red", "blue", "a cat", "cat.", "cat"]
    counts = []
    for left in range(10):
        others = Counter(plain(answers[other]) for other in range(10) if other != left)
        counts.append(min(1, others[plain(response)] / 3))
    assert vqa_accuracy(response, answers) == pytest.approx(sum(counts) / 10)


def test_single_answers_and_exact_ones():
    assert vqa_accuracy("the Seven", ["7"]) == 1
    assert vqa_accuracy("8", ["7"]) == 0
    assert exact_match(" a  cat\n", ["dog", "a cat"]) == 1
    assert exact_match("A cat", ["a cat"]) == 0


@pytest.fixture
def asked(make_model, tiny, tmp_path):
    """A model with its encoder, and a file of nine questions, one of them about a picture that cannot be read."""
    vision = tiny(image_size=8)
    vision.save_pretrained(tmp_path / "vision")
    merged = {"vision_channels": 4 * 64, "vision_merge": 2, "vision_layers": 2}  # a slot of 2x2 patches
    make_model(**merged).save_pretrained(tmp_path / "model")
    lines = []
    for number in range(9):
        smooth_picture((12, 10), number).save(tmp_path / f"{number}.png")
        line = {"image": f"{number}.png", "question": "which digit?" if number % 2 else "which colour, if any?"}
        line |= (
            {"choices": ["seven", "no digit at all", "3"], "answer": "3"} if number % 3 == 0 else {"answer": "seven"}
        )
        lines.append(line | {"mine": [number, "\u00e9"]})
    lines[4] = {"image": "4.png", "question": "and now?", "answers": ["seven", "a", "b", "c"]}
    lines[5].pop("answer")
    (tmp_path / "7.png").write_text("no")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path, lines


def command(folder, *more):
    places = ["--checkpoint", folder / "model", "--vision", folder / "vision", "--longest", 4, "--batch-size", 4]
    return [folder / "questions.jsonl", *places, *more]


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_responses_are_those_of_the_model(capsys, asked):
    """Written ones greedily, of choices the likeliest; and scored as a hand counts."""
    folder, lines = asked
    out = folder / "responses.jsonl"
    assert f"9 responses in {out}" in ok(capsys, "unifluid", "ask", *command(folder, "--out", out))
    found = written(out)
    assert [{key: line[key] for key in lines[0] if key in line} for line in found] == [
        {key: line[key] for key in lines[0] if key in line} for line in lines
    ]
    assert found[7]["response"] is None
    model, vision = UniFluid.from_pretrained(folder / "model"), VisionFeatures(folder / "vision", merge=2)
    tokenizer = model.text_tokenizer

    def ids_of(text):
        return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    for place in (0, 1, 2):
        pixels = to_tensor(center_crop(open_picture(folder / f"{place}.png"), (8, 8)))
        features = vision(normalize(pixels[None]))
        # -1: the feature of the picture
        prompt = [-1, tokenizer.bos_token_id, *ids_of(lines[place]["question"])]
        if place:
            ids, real = padded([prompt], tokenizer)
            assert found[place]["response"] == answer(model, features, ids, real, 4)[0]
            continue
        expected = []
        for choice in lines[0]["choices"]:
            said = ids_of(choice)
            ids = torch.tensor([prompt + said])
            logits = model.answer_logits(features, ids, torch.ones_like(ids, dtype=torch.bool), len(said))
            expected.append(sum(row.log_softmax(0)[token].item() for row, token in zip(logits[0], said, strict=True)))
        assert found[0]["likelihoods"] == pytest.approx(expected, rel=1e-4)
        assert found[0]["response"] == lines[0]["choices"][expected.index(max(expected))]

    scored = json.loads(ok(capsys, "unifluid", "evaluate", out, "--json"))
    again = json.loads(ok(capsys, "unifluid", "evaluate", *command(folder, "--json")))
    assert scored == again
    assert (scored["questions"], scored["skipped"], scored["unanswered"]) == (9, 1, 1)
    with_text = [found[place] for place in (1, 2, 8)]
    assert scored["exact_match"] == sum(line["response"] in ("seven",) for line in with_text) / 4


def responses(folder, values):
    """A file of responses that was not written by a model."""
    lines = []
    for number, value in enumerate(values):
        smooth_picture((8, 8), number).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "what?", **value}))
    (folder / "responses.jsonl").write_text("\n".join(lines))
    return folder / "responses.jsonl"


def test_scores_as_a_hand_counts_them(capsys, tmp_path):
    choices = {"choices": ["no", "certainly"], "answer": "certainly"}
    file = responses(
        tmp_path,
        [
            {"answer": "seven", "response": "7"},  # VQA alone
            {"answer": "seven", "response": "seven"},
            {"answers": ["red", "red", "blue", "Red"], "response": "red"},  # 2/3 three times, 1 once
            {"answers": ["x", "y"], "response": "z"},
            {"response": "of no use"},
            {"answer": "seven", "response": None},
            {**choices, "response": "certainly", "likelihoods": [-3.0, -2.0]},
            {**choices, "response": "no", "likelihoods": [-2.0, -4.5]},  # -1 and -0.5 a byte
            {**choices, "response": "no", "likelihoods": [-1.0, -9.0]},
        ],
    )
    out = tmp_path / "scores.json"
    expected = {
        "questions": 9,
        "skipped": 1,
        "unanswered": 1,
        "exact_match": 2 / 4,
        "vqa_accuracy": (1 + 1 + (3 * 2 / 3 + 1) / 4) / 4,
        "choice": 1 / 3,
        "choice_per_byte": 2 / 3,
    }
    head, row = (line.split("\t") for line in ok(capsys, "unifluid", "evaluate", file, "--out", out).splitlines())
    assert head == ["questions", "exact match", "VQA accuracy", "choice", "choice, per byte"]
    assert row == ["9", "0.5000", f"{expected['vqa_accuracy']:.4f}", "0.3333", "0.6667"]
    assert json.loads(out.read_text()) == pytest.approx(expected)


@pytest.mark.parametrize("drawn", [[], ["--temperature", 1.5, "--top-p", 0.9]], ids=["greedy", "drawn"])
def test_processes_share_the_questions(asked, drawn):
    """One and three: the same bytes, also of answers that are drawn."""
    folder, _ = asked

    def act():
        arguments = command(folder, *drawn, "--device", "cpu", "--batch-size", 2, "--out", folder / f"{world}.jsonl")
        with open(folder / "printed", "a") as sys.stdout:
            main([str(argument) for argument in ("unifluid", "ask", *arguments)])

    for world in (1, 3):
        for said, status in two.both(act, folder, world):
            assert status == 0, said
    assert (folder / "1.jsonl").read_bytes() == (folder / "3.jsonl").read_bytes()
    assert len((folder / "printed").read_text().splitlines()) == 2
    assert not math.isnan(written(folder / "1.jsonl")[0]["likelihoods"][0])


def test_drawn_answers_have_a_seed(capsys, asked):
    folder, _ = asked
    found = []
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 1]), ("d", ["--beams", 3])):
        how = ["--temperature", 2] if name != "d" else []
        ok(capsys, "unifluid", "ask", *command(folder, *how, *more, "--out", folder / f"{name}.jsonl"))
        found.append([line["response"] for line in written(folder / f"{name}.jsonl")])
    assert found[0] == found[1] != found[2]
    assert all(len(each) == 9 for each in found)
    pictures = [folder / "0.png", folder / "1.png", "-q", "what?", *command(folder)[1:], "--temperature", 2]
    assert ok(capsys, "unifluid", "ask", *pictures) == ok(capsys, "unifluid", "ask", *pictures)


def test_padding_changes_no_likelihood(make_model):
    model = make_model()
    features = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    said = about_a_picture("which digit?", "seven"), about_a_picture("?", "a very long answer indeed")
    together = log_likelihoods(model, features, said)
    for row, conversation in enumerate(said):
        alone = log_likelihoods(model, features[row : row + 1], [conversation])
        assert together[row].item() == pytest.approx(alone.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": " "}, "question: expected a text"),
        ({"question": None}, "question: expected a text"),
        ({"answer": "a", "answers": ["a"]}, "expected either answer or answers"),
        ({"answers": "a"}, "answers: expected a list of texts"),
        ({"answers": ["a", 3]}, "answers: expected a text, not empty"),
        ({"choices": ["a"]}, "choices: expected several texts, all different"),
        ({"choices": ["a", "a"]}, "choices: expected several texts, all different"),
        ({"choices": ["a", "b"], "answer": "c"}, "choices: expected an answer that is one of them"),
        ({"choices": ["a", "b"], "answers": ["a"]}, "choices: expected an answer that is one of them"),
        ({"image": "../0.png"}, "is outside the folder"),
        ({"image": "none.png"}, "no such file"),
    ],
)
def test_lines_that_cannot_be(tmp_path, fields, message):
    file = responses(tmp_path, [{}, fields])
    with pytest.raises(CaptionError, match=message) as error:
        read_questions(file)
    assert "responses.jsonl:2" in str(error.value)


def test_bad_input(capsys, asked):
    folder, _ = asked
    questions = folder / "questions.jsonl"
    choice = responses(folder, [{"choices": ["a", "b"], "answer": "a", "response": "a"}])
    (folder / "long.jsonl").write_text(json.dumps({"image": "0.png", "question": "far too many words " * 20}))
    (folder / "empty.jsonl").write_text("\n")
    ask, evaluate = ["unifluid", "ask"], ["unifluid", "evaluate"]
    where = command(folder)[1:]
    for arguments, message in (
        ([*ask, questions, *where], "expected --out FILE.jsonl, and no --question"),
        ([*ask, questions, *where, "-q", "a?", "--out", folder / "a.jsonl"], "and no --question"),
        ([*ask, folder / "0.png", *where], "expected --question, and no --out"),
        ([*ask, questions, *where, "--out", questions], "exists; --force overwrites it"),
        ([*ask, folder / "none.jsonl", *where, "--out", folder / "a.jsonl"], "no such file"),
        ([*ask, folder / "empty.jsonl", *where, "--out", folder / "a.jsonl"], "holds no questions"),
        (
            [*ask, folder / "long.jsonl", *where, "--out", folder / "a.jsonl"],
            "long.jsonl:1: context: the transformer has",
        ),
        ([*ask, questions, *where, "--system", " ", "--out", folder / "a.jsonl"], "--system: expected a text"),
        ([*ask, questions, *where, "--system", "a", "--out", folder / "a.jsonl"], "a system prompt needs a tokenizer"),
        ([*ask, questions, *where, "--top-p", 0.5, "--out", folder / "a.jsonl"], "--top-p: nothing is drawn"),
        ([*evaluate, questions], "questions.jsonl:1: no response, expected what `uniflow unifluid ask` wrote"),
        ([*evaluate, choice], "likelihoods: expected a number for each choice, got None"),
        ([*evaluate, questions, "--vision", folder / "vision"], "expected --checkpoint too, to ask, or neither"),
    ):
        assert message in fails(capsys, *arguments), arguments
    with pytest.raises(AssertionError, match=r"7\.png is not a picture"):
        ok(capsys, *ask, questions, *where, "--strict", "--out", folder / "a.jsonl")
    assert not (folder / "a.jsonl").exists()

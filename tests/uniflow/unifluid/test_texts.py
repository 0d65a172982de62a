import pickle
import sys

import pytest
import torch

from uniflow.unifluid.conversations import about_a_picture, question_ids
from uniflow.unifluid.texts import make_text_tokenizer, no_text, padded, padded_marks, prompt_ids, read_text_tokenizer

pytest.importorskip("transformers")

TEXTS = ["a seven", "a three", "which digit?", "is it a seven?"]
STRANGE = ["a seven", "<eos> within <bos> and <pad>", " two  spaces \n\t and , more .", "日本 ünï 😀", "\x00\x7f", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return make_text_tokenizer(TEXTS, 280)


def test_any_text_has_ids_and_comes_back(tokenizer):
    for text in STRANGE:
        ids = prompt_ids(tokenizer, text)
        assert ids[0] == tokenizer.bos_token_id
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids[1:])
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_merges_shorten_what_was_learned_from_and_the_size_is_kept(tokenizer):
    assert len(tokenizer) == 280
    assert len(prompt_ids(tokenizer, "a seven")) < 5
    assert len(make_text_tokenizer(["ab"], 1000)) == 256 + 3 + 1  # there is no more to merge than a and b
    assert len(prompt_ids(make_text_tokenizer(TEXTS, 259), "a seven")) == 1 + len("a seven")
    with pytest.raises(ValueError, match="size: expected at least 259"):
        make_text_tokenizer(TEXTS, 258)


def test_prompts(tokenizer):
    ids = prompt_ids(tokenizer, "a seven")[1:]
    assert prompt_ids(tokenizer, None) == [tokenizer.bos_token_id]
    assert prompt_ids(tokenizer, "a seven", [-1, -2]) == [-1, -2, tokenizer.bos_token_id, *ids]


def test_padding_stands_before_the_text_that_ends_a_row(tokenizer):
    pad = tokenizer.pad_token_id
    rows = [[-1, -1, 5, -1, -1, 6, 7], [-1, -1, 5, 6, 7], [5], []]
    ids, real = padded(rows, tokenizer)
    assert ids.tolist()[:3] == [rows[0], [-1, -1, pad, pad, 5, 6, 7], [pad] * 6 + [5]]
    assert [ids[row][real[row]].tolist() for row in range(4)] == rows
    given = [torch.tensor(row, dtype=torch.int64) for row in rows]
    assert torch.equal(padded_marks(given, [row == 5 for row in given]), ids == 5)


def test_it_survives_pickling_and_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for other in (pickle.loads(pickle.dumps(tokenizer)), read_text_tokenizer(tmp_path)):
        assert len(other) == len(tokenizer)
        for text in STRANGE:
            ids = prompt_ids(other, text)
            assert ids == prompt_ids(tokenizer, text)
            assert other.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_without_pad_pads_with_eos_and_without_eos_is_refused(tokenizer, tmp_path):
    other = pickle.loads(pickle.dumps(tokenizer))
    other.pad_token = None
    other.save_pretrained(tmp_path)
    assert read_text_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id
    other.eos_token = None
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a tokenizer with an eos token, which ends answers; it has none"):
        read_text_tokenizer(tmp_path)


def test_without_bos_none_is_made_up(tokenizer, tmp_path):
    """As Qwen's are: texts begin with themselves, and a dropped one has no ids at all."""
    other = pickle.loads(pickle.dumps(tokenizer))
    other.bos_token = None
    other.save_pretrained(tmp_path)
    read = read_text_tokenizer(tmp_path)
    assert read.bos_token_id is None
    ids = read("a seven", add_special_tokens=False).input_ids
    assert prompt_ids(read, "a seven") == ids
    assert prompt_ids(read, None) == []
    assert no_text(read, 2, torch.device("cpu")).shape == (2, 0)
    assert no_text(tokenizer, 2, torch.device("cpu")).tolist() == [[tokenizer.bos_token_id]] * 2
    assert question_ids(read, about_a_picture("a seven"), [[]]) == [*ids, read.eos_token_id]


def test_folders_that_hold_no_tokenizer(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_text_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no tokenizer that the transformers package can read"):
        read_text_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="holds no tokenizer that the transformers package can read"):
        read_text_tokenizer(tmp_path)


def test_without_the_transformers_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'uniflow-kernels\[hf\]'"):
        make_text_tokenizer(TEXTS, 300)

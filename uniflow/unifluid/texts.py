"""Text to ids and back, with a tokenizer of the transformers package (of the extra `hf`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniflow.config import read_config
from uniflow.foreign import configuration, is_language_model, transformers_package
from uniflow.reading import check_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_BOS, _EOS, _PAD = "<bos>", "<eos>", "<pad>"
_SMALLEST = 256 + 3  # every byte, and the special tokens


def make_text_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE for `texts`: any text has ids, and they decode to the same text.

    Args:
        texts: to learn merges from.
        size: how many ids there are at most: the 256 bytes, bos, eos and pad, and merges as far as the texts have them.

    Raises:
        ImportError: if the transformers package is not installed.
        ValueError: if `size` is below 259.
    """
    if size < _SMALLEST:
        raise ValueError(f"size: expected at least {_SMALLEST} (256 bytes and 3 special tokens), got {size}")
    transformers = transformers_package()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    )


def read_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder, as transformers' AutoTokenizer reads it; where it has no pad token, eos pads.

    Nothing in the folder is executed, and nothing is downloaded.

    Raises:
        FileNotFoundError: if there is no such folder.
        ImportError: if the transformers package is not installed.
        ValueError: if there is no tokenizer in it, or one without an eos token, which ends answers.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    for file in path.iterdir():
        if file.suffix in (".json", ".model", ".txt", ".jinja"):  # what tokenizers are read from
            check_file(file)
    transformers = transformers_package()
    try:
        # without one the package would make a configuration of what it finds there
        config = transformers.PreTrainedConfig()
        if (path / "config.json").exists():
            with suppress(ValueError):  # that of a model that is no language model says nothing about tokenizers
                config = configuration(read_config(path), str(folder), is_language_model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers package raises no narrower class for a damaged file
        reason = str(error).split("\n")[0]
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is not run"
        raise ValueError(f"{folder} holds no tokenizer that the transformers package can read: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: expected a tokenizer with an eos token, which ends answers; it has none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def ids_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what each id stands for, and of the chat template if there is one: it tells tokenizers apart."""
    meaning = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        meaning.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str | None, before: Sequence[int] = ()) -> list[int]:
    """What a picture is drawn from: bos, where the tokenizer has one, and the text's ids; none for a dropped text.

    `before` are the slots of pictures that stand before it, see `uniflow.unifluid.slots`.
    """
    return [*before, *begin_ids(tokenizer), *([] if text is None else text_ids(tokenizer, text))]


def no_text(tokenizer: PreTrainedTokenizerBase, batch: int, device: torch.device) -> Tensor:
    """The ids of dropped texts, int64 [batch, 1]: bos, or [batch, 0] where the tokenizer has none."""
    begin = begin_ids(tokenizer)
    # filled there: copied from the host, it would be waited for
    return torch.full((batch, len(begin)), next(iter(begin), 0), dtype=torch.int64, device=device)


def padded(rows: Sequence[Sequence[int] | Tensor], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Ids, int64 [B, T], padded before the text that ends them, and which of them are real, bool [B, T].

    Pictures that stand first begin in the same column in all rows.
    """
    length = max(map(len, rows), default=0)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id, dtype=torch.int64, device="cpu")
    real = torch.zeros(len(rows), length, dtype=torch.bool, device="cpu")
    for row, given in enumerate(rows):
        own = torch.as_tensor(given, dtype=torch.int64, device="cpu")
        columns = _columns(own, length)
        ids[row, columns], real[row, columns] = own, True
    return ids, real


def padded_marks(rows: Sequence[Tensor], marks: Sequence[Tensor]) -> Tensor:
    """What is marked of each row's ids, bool, in the columns that `padded` gives them; False for padding."""
    length = max(map(len, rows), default=0)
    found = torch.zeros(len(rows), length, dtype=torch.bool, device="cpu")
    for row, (ids, own) in enumerate(zip(rows, marks, strict=True)):
        found[row, _columns(ids, length)] = own
    return found


def _columns(ids: Tensor, length: int) -> Tensor:
    places = torch.arange(len(ids), device="cpu")
    pictures = places[ids < 0]
    first = pictures[-1] + 1 if len(pictures) else 0
    return torch.where(places < first, places, places + length - len(ids))


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Bos, where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text by itself."""
    # a text that spells a special token must not become one: its "<eos>" would end it
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

"""Image tokens that were made once, by `uniflow encode`, in the place of pictures to be encoded in each step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from uniflow.latent_set import LatentsError, LatentSet
from uniflow.pictures import PictureError
from uniflow.reading import printable, shown
from uniflow.unifluid.tokens import ImageTokenizer

if TYPE_CHECKING:
    from uniflow.unifluid.captions import StoredExamples


class CachedLatents:
    """The latents of the pictures that are drawn, and of their sources, by the numbers of examples.

    Args:
        folder: that `uniflow encode` wrote of the same pictures: of the folder with captions.jsonl, or of the shards by
            the same paths.
        tokenizer: that the latents have to be of.
        examples: whose pictures they are; all that have a caption must be there.
        flip: whether mirror images are needed.

    Raises:
        FileNotFoundError: if there is no such set.
        LatentsError: if the set is not finished or damaged, of another tokenizer, of pictures of another size, without
            mirror images that are needed, or lacks a picture.
    """

    def __init__(
        self, folder: str | Path, tokenizer: ImageTokenizer, examples: StoredExamples, flip: bool = False
    ) -> None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no such folder of latents: {folder}")
        self.latents = LatentSet(folder)
        manifest, maker = self.latents.manifest, tokenizer.maker()
        theirs = manifest.tokenizer
        if differing := [name for name, value in maker.tokenizer.items() if theirs.get(name) != value]:
            said = (f"{name} {shown(theirs.get(name))} not {shown(maker.tokenizer[name])}" for name in differing)
            raise LatentsError(f"{folder} was written by another tokenizer: {', '.join(said)}")
        if (manifest.fingerprint, manifest.encoder) != maker[1:]:
            raise LatentsError(f"{folder} was written by a tokenizer of the same shape with other weights")
        if manifest.size != tokenizer.image_size:
            own, wanted = ("x".join(map(str, size)) for size in (manifest.size, tokenizer.image_size))
            raise LatentsError(f"{folder} holds latents of pictures of {own} pixels, expected {wanted}")
        if flip and not manifest.flips:
            raise LatentsError(f"{folder} has no latents of mirror images; encode with --flip, or flip: false")
        names, skipped = self.latents.names()
        if len(set(names)) < len(names):
            raise LatentsError(f"{folder} has two latents of one name")
        rows = {name: row for row, name in enumerate(names)} | dict.fromkeys(skipped, -1)
        found = [self._rows(examples, number, rows) for number in range(len(examples))]
        self._ends = np.cumsum([len(each) for each in found])
        self._found = np.array([row for each in found for row in each], np.int64)

    def read(self, number: int, flipped: bool) -> Tensor:
        """[1 + S, N, C], of an example's picture and its S sources, as they are stored; of mirror images if `flipped`.

        Raises:
            PictureError: if one of the pictures could not be read when they were encoded.
        """
        rows = self._found[self._ends[number - 1] if number else 0 : self._ends[number]].tolist()
        if -1 in rows:
            raise PictureError("its picture, or a source, could not be read when the latents were made")
        return torch.stack([self.latents.latent(row, flipped) for row in rows])

    def _rows(self, examples: StoredExamples, number: int, rows: dict[str, int]) -> list[int]:
        """Which latents an example has; -1 for a picture that could not be read, none for what is not drawn."""
        if not examples.texts(number).caption:
            return []
        called = examples.pictures_to_draw(number)
        for name in called:
            if name not in rows:
                raise LatentsError(
                    f"{self.latents.folder} has no latent of {printable(name)}; expected those of all pictures that "
                    "have a caption, and of their sources"
                )
        return [rows[name] for name in called]

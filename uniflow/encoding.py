"""From pictures to latents by CUDA graphs, as `uniflow.sampler` has it for the way back."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from uniflow.config import UniFlowConfig
from uniflow_kernels.graphs import GraphCache, Reader, why_not_graph

Size = tuple[int, int]


class Tokenizer(Protocol):
    """What encoding asks of a UniFlow, which is a module; encoding never calls its submodules `decoding_parts`."""

    config: UniFlowConfig
    training: bool
    decoding_parts: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""

    @property
    def device(self) -> torch.device:
        """Of the parameters."""

    def checked_images(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as they are encoded; raises an error if they cannot be."""

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to latents [B, N, latent_ch]."""


class ImageEncoder:
    """Encodes batches of images; `UniFlow.compile_encoder` makes it.

    On CUDA a batch of the shape that it was made for is one CUDA graph; other batches, and other sizes, run as they are
    until they come back, then they get a graph too (the last eight kinds are kept). Images and latents are copied, and
    weights are read where they are. Safe to call from several threads and streams. No gradients. On a CPU it is the
    same without graphs. A copy, or one that was pickled, has a copy of the model, and captures graphs of its own.

    Args:
        model: a UniFlow.
        batch: how many images it is compiled for.
        size: (H, W) of the images that it is compiled for, in pixels.

    Raises:
        ValueError: as `UniFlow.compile_encoder`.
    """

    def __init__(self, model: Tokenizer, batch: int, size: Size) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        patch = model.config.patch_size
        if min(size) < 1 or size[0] % patch or size[1] % patch:
            raise ValueError(f"size: expected positive multiples of the patch ({patch}), got {size[0]}x{size[1]}")
        self.model = model
        self.batch = batch
        self.size = size
        self._graphs = GraphCache("ImageEncoder")
        self._reader = Reader(skipped=model.decoding_parts)
        if model.device.type == "cuda":
            images = torch.zeros(batch, model.config.num_channels, *size, dtype=model.dtype, device=model.device)
            for _ in range(2):  # the second of a kind is captured
                self(images)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageEncoder, (self.model, self.batch, self.size)

    def __call__(self, images: Tensor) -> Tensor:
        """Images to latents.

        Args:
            images: [B, C, H, W], normalised, float, of any size that `UniFlow.encode` takes.

        Returns:
            [B, N, latent_ch], on the model's device.

        Raises:
            TypeError, ValueError: as `UniFlow.encode`.
        """
        model = self.model
        with torch.no_grad():
            images = model.checked_images(images.to(model.device, non_blocking=True))
            if why_not_graph(model.device, ()) is not None:
                return model.encode(images)
            read = self._reader(cast(nn.Module, model))
            if read.hooked:
                return model.encode(images)
            return self._graphs(model.encode, (images,), read.tensors, model.training, read.structure)

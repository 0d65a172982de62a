"""A compiled sampler: batches of latents to pictures, on CUDA from graphs, with copies that overlap the work."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uniflow_kernels.graphs import GraphCache, why_not_graph
from uniflow_kernels.ops.patches import patch_grid

Size = tuple[int, int]
Batch = Tensor | tuple[Tensor, Size]


class Shape(NamedTuple):
    """What a decoder is compiled for.

    Args:
        batch: pictures.
        size: (H, W) of the pictures in pixels.
        patch_size: P, in pixels.
        latent_channels: of a token.
        patch_values: C*P*P, the length of a row of noise.
    """

    batch: int
    size: Size
    patch_size: int
    latent_channels: int
    patch_values: int

    @property
    def tokens(self) -> int:
        """Of a picture."""
        return (self.size[0] // self.patch_size) * (self.size[1] // self.patch_size)


class Decoder:
    """Decodes batches of pictures with settings that were fixed once; `UniFlow.compile_decoder` makes it.

    On CUDA a batch of the shape that it was made for is one CUDA graph; other batches, and other sizes, run as they are
    until they come back, then they get a graph too (the last eight kinds are kept). Weights are read where they are.
    Safe to call from several threads and streams. No gradients. On a CPU it is the same without graphs.

    Args:
        model: whose parameters and hooks count.
        decode: called with latents, what draws the noise of a slice of the batch, and the size; returns pictures.
        shape: what it is compiled for.
        how: the settings of `decode`, to tell graphs apart.
        device, dtype: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        decode: Callable[[Tensor, Callable[[slice], Tensor], Size], Tensor],
        shape: Shape,
        how: Hashable,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shape = shape
        self._model = model
        self._decode = decode
        self._how = how
        self._device = device
        self._dtype = dtype
        self._graphs = GraphCache("Decoder")
        if device.type == "cuda":
            latents = torch.zeros(shape.batch, shape.tokens, shape.latent_channels, device=device)
            for _ in range(2):  # the second of a kind is captured
                self(latents, noise=latents.new_zeros(shape.batch, shape.tokens, shape.patch_values))

    def __call__(
        self,
        latents: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        size: Size | None = None,
    ) -> Tensor:
        """Latents to pictures.

        Args:
            latents: [B, N, latent_ch].
            noise: [B, N, C*P*P] to start from.
            generator: to draw it with, picture after picture, on any device: the same noise for a seed whatever the
                batches. PyTorch's default one for the CPU if neither is given.
            size: (H, W) of the pictures in pixels, if not the size that it was compiled for.

        Returns:
            [B, C, H, W], on the model's device.

        Raises:
            ValueError: if a shape does not fit.
        """
        size = self.shape.size if size is None else size
        patch_grid(latents.shape[1] if latents.ndim == 3 else 0, self.shape.patch_size, size)
        expected = (*latents.shape[:2], self.shape.patch_values)
        if noise is not None and noise.shape != expected:
            raise ValueError(f"noise: expected shape {expected}, one row of pixels a token, got {tuple(noise.shape)}")
        draw = _Noise(noise, generator, expected)
        with torch.no_grad():
            latents = latents.to(self._device, self._dtype, non_blocking=True)
            if why_not_graph(self._device, ()) is not None or any(map(_has_hooks, self._model.modules())):
                return self._decode(latents, draw, size)

            def decode(latents: Tensor, noise: Tensor) -> Tensor:
                return self._decode(latents, noise.__getitem__, size)

            everything = draw(slice(0, len(latents))).to(torch.promote_types(self._dtype, torch.float32))
            if everything.device.type == "cpu" and everything.numel():
                everything = everything.pin_memory()
            everything = everything.to(self._device, non_blocking=True)
            how = (self._how, size, self._model.training)
            return self._graphs(decode, (latents, everything), list(self._model.parameters()), how)

    def stream(self, batches: Iterable[Batch], generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Pictures on the host, batch by batch, in order.

        On CUDA a batch is given out while the next one is computed, and its copy to pinned memory overlaps that; the
        next batch is taken from `batches` before. On a CPU a batch is computed when it is asked for.

        Args:
            batches: latents [B, N, latent_ch], or pairs of them and a size (H, W).
            generator: to draw the noise of all batches with, see `__call__`.

        Yields:
            [B, C, H, W].
        """
        waiting: tuple[Tensor, torch.cuda.Event] | None = None
        copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        for batch in batches:
            latents, size = (batch, None) if isinstance(batch, Tensor) else batch
            images = self(latents, generator=generator, size=size)
            if copies is None:
                yield images
                continue
            following = _copied(images, copies)
            if waiting is not None:
                yield _finished(*waiting)
            waiting = following
        if waiting is not None:
            yield _finished(*waiting)


class _Noise:
    """The noise of slices of a batch, in order: of the tensor given, or drawn picture after picture."""

    def __init__(self, given: Tensor | None, generator: torch.Generator | None, shape: Sequence[int]) -> None:
        self._given = given
        self._generator = generator
        self._shape = shape

    def __call__(self, rows: slice) -> Tensor:
        if self._given is not None:
            return self._given[rows]
        batch, tokens, row = self._shape
        device = "cpu" if self._generator is None else self._generator.device
        drawn = torch.empty(len(range(batch)[rows]), tokens, row, device=device)
        for picture in drawn:
            torch.randn(tokens, row, generator=self._generator, out=picture)
        return drawn


def _copied(images: Tensor, copies: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
    """A copy in pinned memory, and what says that it is there."""
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    copies.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(copies):
        host.copy_(images, non_blocking=True)
        images.record_stream(copies)
        done = torch.cuda.Event()
        done.record(copies)
    return host, done


def _finished(host: Tensor, done: torch.cuda.Event) -> Tensor:
    done.synchronize()
    return host


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)

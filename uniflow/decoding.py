"""A compiled sampler: batches of latents to pictures, on CUDA from graphs, with copies that overlap the work."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uniflow_kernels import seeded_noise
from uniflow_kernels.graphs import GraphCache, why_not_graph
from uniflow_kernels.ops.patches import patch_grid
from uniflow_kernels.torch_private import is_forward_hooked

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
        decode: called with latents, what they start from (see `start_of`), and the size; returns pictures.
        shape: what it is compiled for.
        how: the settings of `decode`, to tell graphs apart.
        device, dtype: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        decode: Callable[[Tensor, Tensor, Size], Tensor],
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
                self(latents, seed=0)

    def __call__(
        self,
        latents: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        size: Size | None = None,
    ) -> Tensor:
        """Latents to pictures.

        Args:
            latents: [B, N, latent_ch].
            noise, generator, seed: as `UniFlow.decode` takes them.
            size: (H, W) of the pictures in pixels, if not the size that it was compiled for.

        Returns:
            [B, C, H, W], on the model's device.

        Raises:
            TypeError, ValueError: as `UniFlow.decode`.
        """
        size = self.shape.size if size is None else size
        patch_grid(latents.shape[1] if latents.ndim == 3 else 0, self.shape.patch_size, size)
        shape = (*latents.shape[:2], self.shape.patch_values)
        start = start_of(shape, noise, generator, seed, self._device)

        def decode(latents: Tensor, start: Tensor) -> Tensor:
            return self._decode(latents, start, size)

        with torch.no_grad():
            latents = latents.to(self._device, self._dtype, non_blocking=True)
            if why_not_graph(self._device, ()) is not None or any(map(is_forward_hooked, self._model.modules())):
                return decode(latents, start)
            if noise is not None:
                start = _moved(start.to(torch.promote_types(self._dtype, torch.float32)), self._device)
            how = (self._how, size, self._model.training)
            return self._graphs(decode, (latents, start), list(self._model.parameters()), how)

    def stream(self, batches: Iterable[Batch], generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Pictures on the host, batch by batch, in order.

        On CUDA a batch is given out while the next one is computed, and its copy to pinned memory overlaps that; the
        next batch is taken from `batches` before. On a CPU a batch is computed when it is asked for.

        Args:
            batches: latents [B, N, latent_ch], or pairs of them and a size (H, W).
            generator: that of the noise of all batches, see `UniFlow.decode`.

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


def start_of(
    shape: Sequence[int],
    noise: Tensor | None,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    device: torch.device,
) -> Tensor:
    """What a batch starts from: the noise that is given, or an int64 seed [B] for each picture, then on `device`.

    Args:
        shape: of the noise, (B, N, C*P*P).
        noise, generator, seed: as `UniFlow.decode` takes them.
        device: of the model.

    Raises:
        TypeError, ValueError: as `UniFlow.decode`.
    """
    given = [name for name, value in (("noise", noise), ("generator", generator), ("seed", seed)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: expected at most one of them")
    if noise is not None:
        if noise.shape != shape:
            raise ValueError(
                f"noise: expected shape {tuple(shape)}, one row of pixels a token, got {tuple(noise.shape)}"
            )
        if not noise.is_floating_point():
            raise TypeError(f"noise: expected a floating point dtype, got {noise.dtype}")
        return noise
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected a tensor of torch.int64, got {seed.dtype}")
        if seed.shape != shape[:1]:
            raise ValueError(f"seed: expected shape ({shape[0]},), one a picture, got {tuple(seed.shape)}")
        return _moved(seed, device)
    if seed is not None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), got {seed}")
        generator = torch.Generator().manual_seed(seed)
    if generator is None:
        return torch.randint(2**63 - 1, shape[:1], device=device)
    seeds = torch.empty(shape[0], dtype=torch.int64, device=generator.device)
    for one in seeds:  # a GPU would draw others for several at once
        one.random_(generator=generator)
    return _moved(seeds, device)


def noise_of(start: Tensor, pictures: slice, tokens: slice, row: int) -> Tensor:
    """The noise [b, n, row] of some tokens of some pictures, given what their batch starts from."""
    if start.is_floating_point():
        return start[pictures, tokens]
    seeds, count = start[pictures], tokens.stop - tokens.start
    noise = seeded_noise(len(seeds) * count, row, seeds, device=seeds.device, first_row=tokens.start)
    return noise.view(len(seeds), count, row)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait for a GPU to take it."""
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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

"""From latents to pictures: the noise they start from, the pieces they are made in, and the same from CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from uniflow.config import UniFlowConfig
from uniflow.encoder import bytes_of_layer
from uniflow.flow_decoder import FlowDecoder
from uniflow.normalization import IMAGENET_MEAN, IMAGENET_STD
from uniflow_kernels import seeded_noise, to_images
from uniflow_kernels.graphs import GraphCache, Reader, why_not_graph
from uniflow_kernels.modules.sampling import follow
from uniflow_kernels.ops.fp8_linear import bytes_per_row
from uniflow_kernels.ops.noise import integer_seed, where_drawn
from uniflow_kernels.ops.patches import patch_grid
from uniflow_kernels.solvers import Plan

Size = tuple[int, int]
Batch = Tensor | tuple[Tensor, Size] | tuple[Tensor, Size, Tensor]


class Tokenizer(Protocol):
    """What a sampler asks of a UniFlow, which is a module; decoding never calls its submodules `encoding_parts`."""

    config: UniFlowConfig
    flow_head: FlowDecoder
    training: bool
    encoding_parts: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""

    @property
    def device(self) -> torch.device:
        """Of the parameters."""

    def condition(self, latents: Tensor, size: Size | None = None) -> Tensor:
        """Latents [B, N, latent_ch] to [B, N, D]."""

    def check_latents(self, latents: Tensor) -> None:
        """Raise an error if they are not [B, N, latent_ch], float."""


@dataclass  # not frozen: torch 2.11 compiles none that is
class Sampler:
    """Latents to images, with settings that were chosen once.

    Args:
        model: a UniFlow.
        plan: steps, schedule, solver and guidance.
        temperature, max_memory: as `UniFlow.decode` takes them.
        pictures: the dtype of pictures that are denormalised and clamped, a floating one or torch.uint8; None for
            images as the encoder reads them, in the model's dtype.
    """

    model: Tokenizer
    plan: Plan
    temperature: float = 1.0
    max_memory: int | None = None
    pictures: torch.dtype | None = None

    def start(
        self,
        latents: Tensor,
        size: Size | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
        seed: int | Tensor | None,
    ) -> Tensor:
        """What latents [B, N, latent_ch] start from, see `start_of`; arguments and errors as of `UniFlow.decode`."""
        config = self.model.config
        self.model.check_latents(latents)
        patch_grid(latents.shape[1], config.patch_size, size)  # nothing is drawn for what is refused
        return start_of((*latents.shape[:2], config.patch_values), noise, generator, seed, self.model.device)

    def __call__(self, latents: Tensor, start: Tensor, size: Size | None = None) -> Tensor:
        """Latents [B, N, latent_ch] and what they start from to [B, C, H, W], as many at a time as memory allows."""
        patch, batch = self.model.config.patch_size, latents.shape[0]
        grid = down, across = patch_grid(latents.shape[1], patch, size)
        size = down * patch, across * patch
        rows, lines = self.at_a_time(batch, grid)
        if rows >= batch and lines >= down:
            return self._lines(self.model.condition(latents, size), start, across, 0, down)
        images = None
        for first in range(0, max(1, batch), rows):
            part = slice(first, first + rows)
            condition = self.model.condition(latents[part], size)
            for top in range(0, down, lines):
                bottom = min(top + lines, down)
                piece = self._lines(condition, start[part], across, top, bottom)
                if images is None:
                    images = piece.new_empty(batch, piece.shape[1], *size)
                images[part, :, top * patch : bottom * patch] = piece
                del piece  # before the next one is made
        assert images is not None
        return images

    def _lines(self, condition: Tensor, start: Tensor, across: int, top: int, bottom: int) -> Tensor:
        """Some lines of patches of pictures, given the whole pictures' condition [b, N, D] and start."""
        config, head, dtype = self.model.config, self.model.flow_head, self.model.dtype
        tokens = slice(top * across, bottom * across)
        noise = noise_of(start, tokens, config.patch_values)
        noise = noise.to(condition.device, torch.promote_types(dtype, torch.float32))
        if self.temperature != 1.0:
            noise = noise * self.temperature
        # nothing is held ahead beside what `decoding_bytes_per_token` counts
        # rows, not pictures of rows, of which every product would make rows; a view, as only whole pictures are several
        rows = [condition[:, tokens].flatten(0, 1)]
        del condition  # whoever embeds it lets it go
        x, velocity, dt = follow(
            head.net,
            noise.flatten(0, 1),
            rows.pop(),
            self.plan,
            time_scale=head.time_scale,
            ahead=False,
        )
        x, velocity = x.view(noise.shape), velocity.view(noise.shape)
        size = (bottom - top) * config.patch_size, across * config.patch_size
        end: dict[str, Any] = {"dtype": dtype}
        if self.pictures is not None:
            end = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "clamp": True, "dtype": self.pictures}
        return to_images(x, config.patch_size, size, velocity=velocity, dt=dt, **end)

    def at_a_time(self, batch: int, grid: tuple[int, int]) -> tuple[int, int]:
        """How many pictures, all or more, and of one picture how many lines of patches, are made at a time.

        Raises:
            ValueError: if there is not the memory for one picture.
        """
        if self.max_memory is None:
            return batch, grid[0]
        config, tokens = self.model.config, grid[0] * grid[1]
        precision = self.model.flow_head.net.precision
        in_blocks, in_head = decoding_bytes_per_token(config, self.model.dtype, self.plan.cfg != 1.0, precision)
        if tokens * max(in_blocks, in_head) <= self.max_memory:
            return self.max_memory // (tokens * max(in_blocks, in_head)), grid[0]
        # the global blocks need a picture whole; its condition stays while its lines are decoded
        kept = tokens * config.vit_hidden_size * self.model.dtype.itemsize
        least = max(tokens * in_blocks, kept + grid[1] * in_head)
        if self.max_memory < least:
            height, width = (extent * config.patch_size for extent in grid)
            raise ValueError(
                f"max_memory: a picture of {height}x{width} needs at least {least / 1e6:.3f} MB, got "
                f"{self.max_memory / 1e6:.3f} MB"
            )
        return 1, min((self.max_memory - kept) // (grid[1] * in_head), grid[0])


def decoding_bytes_per_token(
    config: UniFlowConfig, dtype: torch.dtype, guided: bool, precision: str | None = None
) -> tuple[int, int]:
    """At most how many bytes a token decoding holds at a time beside weights, latents and pictures.

    Args:
        config: of the model.
        dtype: of its parameters.
        guided: whether there is guidance, of whose two branches there are conditions.
        precision: of the model, "fp8" or None.

    Returns:
        In the global blocks, and in the flow head with the end of sampling.
    """
    width, head, row, size = config.vit_hidden_size, config.head_width, config.patch_values, dtype.itemsize
    # the sum, its norm, four widths before and four after GELU, two to spare
    in_blocks = 12 * width * size
    # conditions; the embedded ones, three modulations, the first sum and the last, norm, scale, two to spare;
    # noise, state, next state and pixels in float32, slopes and rounded state in the model's dtype
    in_head = ((2 if guided else 1) * width + 12 * head) * size + 4 * row * (max(4, size) + size)
    if precision is not None:  # a layer's input in 8 bits beside it, and the modulations of all blocks at once
        in_blocks += bytes_of_layer(width, 4 * width, dtype)
        in_head += bytes_per_row(head, (3 * config.num_decoder_layers + 2) * head, dtype)
    in_noise = width * size + 40 * row  # in plain PyTorch: the words that noise is made of, eight bytes each
    return in_blocks, max(in_head, in_noise)


# --- what pictures start from ---


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
    if torch.compiler.is_exporting() and (generator is not None or seed is not None):
        raise ValueError("generator, seed: an exported program draws from none; expected seeds, int64 [B], or noise")
    if seed is not None:
        generator = torch.Generator().manual_seed(integer_seed(seed))
    if generator is None:
        return torch.randint(2**63 - 1, shape[:1], device=device)
    seeds = torch.empty(shape[0], dtype=torch.int64, device=where_drawn(generator, device))
    for one in seeds:  # a GPU would draw others for several at once
        one.random_(generator=generator)
    return _moved(seeds, device)


def noise_of(start: Tensor, tokens: slice, row: int) -> Tensor:
    """The noise [b, n, row] of some tokens of pictures, given what these start from."""
    if start.is_floating_point():
        return start[:, tokens]
    pictures, count = start.shape[0], tokens.stop - tokens.start
    noise = seeded_noise(pictures * count, row, start, device=start.device, first_row=tokens.start)
    return noise.view(pictures, count, row)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait for a GPU to take it."""
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# --- from CUDA graphs ---


class Decoder:
    """Decodes batches of pictures with settings that were fixed once; `UniFlow.compile_decoder` makes it.

    On CUDA a batch of the shape that it was made for is one CUDA graph; other batches, and other sizes, run as they are
    until they come back, then they get a graph too (the last eight kinds are kept). Weights are read where they are.
    Safe to call from several threads and streams. No gradients. On a CPU it is the same without graphs. A copy, or one
    that was pickled, has a copy of the model, and captures graphs of its own.

    Args:
        sampler: of pictures.
        batch: how many it is compiled for.
        size: (H, W) of the pictures that it is compiled for, in pixels.

    Raises:
        TypeError, ValueError: as `UniFlow.compile_decoder`.
    """

    def __init__(self, sampler: Sampler, batch: int, size: Size) -> None:
        config, dtype = sampler.model.config, sampler.pictures
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        if dtype is None or not (dtype.is_floating_point or dtype == torch.uint8):
            raise TypeError(f"dtype: expected a floating point dtype or torch.uint8, got {dtype}")
        tokens = (size[0] // config.patch_size) * (size[1] // config.patch_size)
        sampler.at_a_time(batch, patch_grid(tokens, config.patch_size, size))
        self.sampler = sampler
        self.batch = batch
        self.size = size
        self._graphs = GraphCache("Decoder")
        self._reader = Reader(skipped=sampler.model.encoding_parts)
        if sampler.model.device.type == "cuda":
            latents = torch.zeros(batch, tokens, config.latent_ch, dtype=torch.float32, device=sampler.model.device)
            for _ in range(2):  # the second of a kind is captured
                self(latents, seed=0)

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoder, (self.sampler, self.batch, self.size)

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
        sampler, model = self.sampler, self.sampler.model
        size = self.size if size is None else size
        start = sampler.start(latents, size, noise, generator, seed)
        with torch.no_grad():
            latents = latents.to(model.device, model.dtype, non_blocking=True)
            if why_not_graph(model.device, ()) is not None:
                return sampler(latents, start, size)
            read = self._reader(cast(nn.Module, model))
            if read.hooked:
                return sampler(latents, start, size)
            if noise is not None:
                start = _moved(start.to(torch.promote_types(model.dtype, torch.float32)), model.device)
            settings = sampler.plan, sampler.temperature, sampler.max_memory, sampler.pictures
            how = (*settings, model.flow_head.net.precision, size, model.training)
            return self._graphs(partial(sampler, size=size), (latents, start), read.tensors, how, read.structure)

    def stream(self, batches: Iterable[Batch], generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Pictures on the host, batch by batch, in order.

        On CUDA a batch is given out while the next one is computed, and its copy to pinned memory overlaps that; the
        next batch is taken from `batches` before. On a CPU a batch is computed when it is asked for.

        Args:
            batches: latents [B, N, latent_ch], or tuples of them, a size (H, W) and, if it is not drawn, the seed of
                each picture's noise, int64 [B].
            generator: that of the noise of all batches that come without seeds, see `UniFlow.decode`.

        Yields:
            [B, C, H, W].
        """
        device = self.sampler.model.device
        waiting: tuple[Tensor, torch.cuda.Event] | None = None
        copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        for batch in batches:
            latents, size, seeds = (batch, None, None) if isinstance(batch, Tensor) else (*batch, None)[:3]
            images = self(latents, generator=generator if seeds is None else None, seed=seeds, size=size)
            if copies is None:
                yield images
                continue
            following = _copied(images, copies)
            if waiting is not None:
                yield _finished(*waiting)
            waiting = following
        if waiting is not None:
            yield _finished(*waiting)


def _copied(images: Tensor, copies: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
    """A copy in pinned memory, and what says that it is there."""
    host = torch.empty(images.shape, dtype=images.dtype, device="cpu", pin_memory=True)
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

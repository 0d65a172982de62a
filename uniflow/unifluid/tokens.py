"""Pictures as continuous tokens, which UniFluid draws, and back: frozen tokenizers made elsewhere."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from uniflow.checkpoint import CheckpointError, assign_state, outline, read_state
from uniflow.config import check_integer
from uniflow.foreign import checked_values
from uniflow.hub import local_folder
from uniflow.latents import fingerprint, hash_weights
from uniflow.model import UniFlow
from uniflow.normalization import denormalize, normalize
from uniflow.reading import read_json, shown

_LARGEST_PICTURE = 1 << 15
_LONGEST_REASON = 300


class ImageTokenizer(nn.Module, ABC):
    """Images of one size to tokens and back; frozen, and always in evaluation mode.

    It computes in the dtype of its parameters, also within autocast, and gives float32: tokens are what is trained on.

    Args:
        model: the autoencoder; frozen, not copied.
        channels: C, of a token.
        image_size: (H, W) in pixels.
        patch_size: side in pixels of what becomes a token.

    Raises:
        ValueError: if the patch does not divide the size.
    """

    def __init__(self, model: nn.Module, channels: int, image_size: tuple[int, int], patch_size: int) -> None:
        super().__init__()
        height, width = image_size
        if min(image_size) < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"image_size: expected multiples of {patch_size} pixels, the side of a token, got {height}x{width}"
            )
        self.model = model.requires_grad_(False).eval()
        self.channels = channels
        self.image_size = image_size
        self.grid = (height // patch_size, width // patch_size)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Take and give images of the size that has so many lines of tokens, and tokens a line."""
        patch = self.image_size[0] // self.grid[0]
        self.grid, self.image_size = grid, (patch * grid[0], patch * grid[1])

    def train(self, mode: bool = True) -> ImageTokenizer:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to tokens.

        Args:
            images: [B, 3, H, W], normalised as by `uniflow.normalize`.

        Returns:
            [B, N, C], one token for each place of the grid in raster order, float32.

        Raises:
            ValueError: for images of another shape.
        """
        if tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(f"images: expected shape {['B', 3, *self.image_size]}, got {list(images.shape)}")
        if not len(images):
            return images.new_empty(0, self.grid[0] * self.grid[1], self.channels, dtype=torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            return self._encode(images.to(self._dtype)).float()

    @torch.no_grad()
    def decode(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens to images.

        Args:
            tokens: [B, N, C].
            generator: for what is drawn on the way, if anything is.

        Returns:
            [B, 3, H, W], normalised as by `uniflow.normalize`, float32.

        Raises:
            ValueError: for tokens of another shape.
        """
        expected = (self.grid[0] * self.grid[1], self.channels)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens: expected shape {['B', *expected]}, got {list(tokens.shape)}")
        if not len(tokens):
            return tokens.new_empty(0, 3, *self.image_size, dtype=torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            return self._decode(tokens.to(self._dtype), generator).float()

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the weights, which tells tokens of one tokenizer from those of another."""

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor: ...

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


class UniFlowTokens(ImageTokenizer):
    """The latents of a UniFlow.

    Args:
        model: frozen, not copied.
        steps: of sampling, to decode with; the model's own number if not given.
        image_size: (H, W) in pixels; the trained size if not given.

    Raises:
        ValueError: if the patch does not divide the size.
    """

    model: UniFlow

    def __init__(self, model: UniFlow, steps: int | None = None, image_size: tuple[int, int] | None = None) -> None:
        config = model.config
        image_size = (config.image_size, config.image_size) if image_size is None else image_size
        super().__init__(model, config.latent_ch, image_size, config.patch_size)
        self.steps = steps

    def fingerprint(self) -> str:
        """That of `uniflow.latents`."""
        return fingerprint(self.model)

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images)

    def _decode(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.model.decode(tokens, self.steps, generator=generator, size=self.image_size)


class AutoencoderTokens(ImageTokenizer):
    """The latents of an autoencoder with the interface of diffusers' AutoencoderKL: the mean, shifted and scaled.

    Args:
        autoencoder: of images in [-1, 1]; with encode(x).latent_dist, decode(z).sample, and a config with
            latent_channels, scaling_factor, block_out_channels and, if there is one, shift_factor. Frozen, not copied.
        image_size: (H, W) in pixels.

    Raises:
        ValueError: if the config lacks a field, or the size is no multiple of what the autoencoder makes one token of.
    """

    model: Any

    def __init__(self, autoencoder: nn.Module, image_size: tuple[int, int]) -> None:
        config = getattr(autoencoder, "config", None)
        try:
            channels, self.scale = config.latent_channels, config.scaling_factor  # type: ignore[union-attr]
            factor = 2 ** (len(config.block_out_channels) - 1)  # type: ignore[union-attr]
        except AttributeError as error:
            raise ValueError(
                "autoencoder: expected the interface of diffusers' AutoencoderKL, but the config of this "
                f"{type(autoencoder).__name__} has no {error.name}"
            ) from None
        super().__init__(autoencoder, channels, image_size, factor)
        self.shift = getattr(config, "shift_factor", None) or 0.0

    def fingerprint(self) -> str:
        """Of all weights."""
        return hash_weights(self.model)

    def _encode(self, images: Tensor) -> Tensor:
        latents = self.model.encode(2 * denormalize(images) - 1).latent_dist.mean
        return rearrange((latents - self.shift) * self.scale, "b c h w -> b (h w) c")

    def _decode(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        latents = rearrange(tokens, "b (h w) c -> b c h w", h=self.grid[0]) / self.scale + self.shift
        return normalize((self.model.decode(latents).sample + 1) / 2)


def read_image_tokenizer(folder: str | Path, image_size: tuple[int, int] | None = None) -> ImageTokenizer:
    """The tokenizer in a checkpoint folder: a UniFlow, or an AutoencoderKL of diffusers.

    Args:
        folder: with config.json, which tells them apart.
        image_size: (H, W) in pixels; the size it was trained at if not given.

    Raises:
        FileNotFoundError: if there is no config.json or no weights.
        ModuleNotFoundError: for an AutoencoderKL without diffusers, naming the extra.
        ValueError: if it is neither, or cannot be read.
    """
    folder = local_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no image tokenizer in {folder}: no config.json")
    values = read_json(path)
    made_by = values.get("_class_name")
    if made_by is None:
        return UniFlowTokens(UniFlow.from_pretrained(folder), image_size=image_size)
    if made_by != "AutoencoderKL":
        raise ValueError(f"{path}: expected a UniFlow or an AutoencoderKL of diffusers, got {shown(made_by)}")
    autoencoder = _read_autoencoder(Path(folder), values)
    trained = autoencoder.config.sample_size
    if image_size is None:
        check_integer(f"{path}: sample_size", trained, 1, _LARGEST_PICTURE)
    return AutoencoderTokens(autoencoder, image_size or (trained, trained))


def _read_autoencoder(folder: Path, values: dict[str, Any]) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "an AutoencoderKL needs diffusers: pip install 'uniflow-kernels[diffusers]'", name=error.name
        ) from None
    own = checked_values(values, str(folder / "config.json"))
    try:
        state = {_now_called(name): tensor for name, tensor in read_state(folder, "diffusion_pytorch_model").items()}
        autoencoder = outline(lambda: AutoencoderKL.from_config(own), state, str(folder))
        assign_state(autoencoder, state, str(folder), torch.float32)
    except CheckpointError:
        raise
    except Exception as error:  # diffusers raises whatever its models do
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ValueError(f"{folder} holds no AutoencoderKL that diffusers can read: {reason}") from None
    return autoencoder.float()


def _now_called(name: str) -> str:
    """The name that diffusers gives now to what it called otherwise in the attention of older autoencoders."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(\.attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name

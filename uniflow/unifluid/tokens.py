"""Pictures as continuous tokens, which UniFluid draws, and back: frozen tokenizers made elsewhere."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from uniflow.checkpoint import CheckpointError, assign_state, outline, read_state
from uniflow.config import LARGEST_WIDTH, check_integer
from uniflow.foreign import checked_values, short_reason
from uniflow.hub import local_folder
from uniflow.latent_set import Maker
from uniflow.latents import fingerprint, hash_weights
from uniflow.model import UniFlow
from uniflow.normalization import denormalize, normalize
from uniflow.reading import read_json, shown

_LARGEST_PICTURE = 1 << 15
_AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC")


class ImageTokenizer(nn.Module, ABC):
    """Images of one size to tokens and back; frozen, and always in evaluation mode.

    It computes in the dtype of its parameters, also within autocast, and gives float32: tokens are what is trained on.
    With a packing of p a token is p x p latents that lie next to each other, of which each channel's stand together,
    line by line.

    Args:
        model: the autoencoder; frozen, not copied.
        channels: of a latent.
        image_size: (H, W) in pixels.
        patch_size: side in pixels of what becomes a latent.
        packing: p, latents a side of a token.

    Raises:
        ValueError: if the side of a token does not divide the size, or for a packing that is none.

    Source: the packed channels' order is that of MAR's `patchify`, and of FLUX.
    """

    def __init__(
        self, model: nn.Module, channels: int, image_size: tuple[int, int], patch_size: int, packing: int = 1
    ) -> None:
        super().__init__()
        check_integer("packing", packing, 1, LARGEST_WIDTH)
        self.model = model.requires_grad_(False).eval()
        self.channels = channels * packing**2
        self.packing = packing
        self.side = patch_size * packing
        self.image_size = image_size
        self.grid = _grid_of(image_size, self.side)

    def at_size(self, image_size: tuple[int, int]) -> ImageTokenizer:
        """The same tokenizer, for images of another size (H, W) in pixels.

        Raises:
            ValueError: if the side of a token does not divide the size.
        """
        other = copy.copy(self)
        other.image_size, other.grid = image_size, _grid_of(image_size, self.side)
        return other

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
            return self.packed(self._encode(images.to(self._dtype)).float())

    def packed(self, latents: Tensor) -> Tensor:
        """Tokens [B, N, C] of latents [B, channels, H / patch, W / patch]."""
        lines, columns = self.grid
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", h=lines, w=columns, p=self.packing)

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
        lines, packed = self.grid[0], {"p": self.packing, "q": self.packing}
        latents = rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=lines, **packed)
        with torch.autocast(tokens.device.type, enabled=False):
            return self._decode(latents.to(self._dtype), generator).float()

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the weights, which tells tokens of one tokenizer from those of another."""

    @abstractmethod
    def maker(self) -> Maker:
        """What a set of its latents says of it."""

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to latents [B, channels, H / patch, W / patch]."""

    @abstractmethod
    def _decode(self, latents: Tensor, generator: torch.Generator | None) -> Tensor:
        """The reverse of `_encode`."""

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def _grid_of(image_size: tuple[int, int], side: int) -> tuple[int, int]:
    height, width = image_size
    if min(image_size) < 1 or height % side or width % side:
        raise ValueError(f"image_size: expected multiples of {side} pixels, the side of a token, got {height}x{width}")
    return height // side, width // side


class UniFlowTokens(ImageTokenizer):
    """The latents of a UniFlow.

    Args:
        model: frozen, not copied.
        steps: of sampling, to decode with; the model's own number if not given.
        image_size: (H, W) in pixels; the trained size if not given.
        packing: see `ImageTokenizer`.

    Raises:
        ValueError: as `ImageTokenizer`.
    """

    model: UniFlow

    def __init__(
        self,
        model: UniFlow,
        steps: int | None = None,
        image_size: tuple[int, int] | None = None,
        packing: int = 1,
    ) -> None:
        config = model.config
        image_size = (config.image_size, config.image_size) if image_size is None else image_size
        super().__init__(model, config.latent_ch, image_size, config.patch_size, packing)
        self.steps = steps

    def fingerprint(self) -> str:
        """That of `uniflow.latents`."""
        return fingerprint(self.model)

    def maker(self) -> Maker:
        """As `uniflow encode` writes it."""
        return Maker.of(self.model)

    def _encode(self, images: Tensor) -> Tensor:
        lines = images.shape[2] // self.model.config.patch_size
        return rearrange(self.model.encode(images), "b (h w) c -> b c h w", h=lines)

    def _decode(self, latents: Tensor, generator: torch.Generator | None) -> Tensor:
        rows = rearrange(latents, "b c h w -> b (h w) c").contiguous()
        return self.model.decode(rows, self.steps, generator=generator, size=self.image_size)


class AutoencoderTokens(ImageTokenizer):
    """The latents of an autoencoder of diffusers, shifted and scaled: of an AutoencoderKL the mean.

    Args:
        autoencoder: of images in [-1, 1], with the interface of AutoencoderKL or AutoencoderDC: encode(x).latent_dist
            or encode(x).latent, decode(z).sample, and a config with latent_channels, scaling_factor, block_out_channels
            or encoder_block_out_channels and, if there is one, shift_factor. Frozen, not copied.
        image_size: (H, W) in pixels.
        packing: see `ImageTokenizer`.

    Raises:
        ValueError: if the config lacks a field; as `ImageTokenizer`.
    """

    model: Any

    def __init__(self, autoencoder: nn.Module, image_size: tuple[int, int], packing: int = 1) -> None:
        config = getattr(autoencoder, "config", None)
        try:
            channels, self.scale = config.latent_channels, config.scaling_factor  # type: ignore[union-attr]
            stride = _stride(config)
        except AttributeError as error:
            raise ValueError(
                "autoencoder: expected the interface of diffusers' AutoencoderKL or AutoencoderDC, but the config of "
                f"this {type(autoencoder).__name__} has no {error.name}"
            ) from None
        super().__init__(autoencoder, channels, image_size, stride, packing)
        self.shift = getattr(config, "shift_factor", None) or 0.0

    def fingerprint(self) -> str:
        """Of all weights."""
        return hash_weights(self.model)

    def maker(self) -> Maker:
        """Its kind, what a latent is of, and how it is shifted and scaled."""
        meaning = {
            "_class_name": type(self.model).__name__,
            "latent_ch": self.channels // self.packing**2,
            "patch_size": self.side // self.packing,
            "shift_factor": self.shift,
            "scaling_factor": self.scale,
        }
        weights = self.fingerprint()
        return Maker(meaning, weights, weights)

    def _encode(self, images: Tensor) -> Tensor:
        encoded = self.model.encode(2 * denormalize(images) - 1)
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        return (latents - self.shift) * self.scale

    def _decode(self, latents: Tensor, generator: torch.Generator | None) -> Tensor:
        return normalize((self.model.decode(latents / self.scale + self.shift).sample + 1) / 2)


def image_tokens(tokenizer: ImageTokenizer, pictures: Tensor) -> Tensor:
    """The tokens [B, N, C] of pictures, uint8 [B, 3, H, W], or of their latents, which were made before.

    Args:
        tokenizer: makes the tokens.
        pictures: or floating-point latents [B, L, channels], one for each place of a patch in raster order.

    Raises:
        ValueError: for pictures or latents of another shape.
    """
    if not pictures.is_floating_point():
        return tokenizer.encode(normalize(pictures))
    lines, columns = (extent * tokenizer.packing for extent in tokenizer.grid)
    expected = (lines * columns, tokenizer.channels // tokenizer.packing**2)
    if tuple(pictures.shape[1:]) != expected:
        raise ValueError(f"latents: expected shape {['B', *expected]}, got {list(pictures.shape)}")
    return tokenizer.packed(rearrange(pictures.float(), "b (h w) c -> b c h w", h=lines))


def is_autoencoder(folder: str | Path) -> bool:
    """Whether a checkpoint folder says that it holds a model of diffusers; not where it cannot be read."""
    try:
        return "_class_name" in read_json(local_folder(folder) / "config.json")
    except (ValueError, OSError):
        return False


def _stride(config: Any) -> int:
    """Side in pixels of what an autoencoder of diffusers makes one latent of: each block but one halves a side."""
    blocks = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
    return 2 ** (len(blocks) - 1)


def read_image_tokenizer(
    folder: str | Path,
    image_size: tuple[int, int] | None = None,
    packing: int = 1,
    grid: tuple[int, int] | None = None,
) -> ImageTokenizer:
    """The tokenizer in a checkpoint folder: a UniFlow, or an AutoencoderKL or AutoencoderDC of diffusers.

    Args:
        folder: with config.json, which tells them apart.
        image_size: (H, W) in pixels; the size it was trained at if not given.
        packing: latents a side of a token, see `ImageTokenizer`.
        grid: in the place of image_size, lines of tokens and tokens a line.

    Raises:
        FileNotFoundError: if there is no config.json or no weights.
        ModuleNotFoundError: for an autoencoder without diffusers, naming the extra.
        ValueError: if it is neither, or cannot be read; without a size for one that does not say its own.
    """
    folder = local_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no image tokenizer in {folder}: no config.json")
    values = read_json(path)
    made_by = values.get("_class_name")

    def size_of(side: int) -> tuple[int, int] | None:
        return image_size if grid is None else (grid[0] * side * packing, grid[1] * side * packing)

    if made_by is None:
        model = UniFlow.from_pretrained(folder)
        return UniFlowTokens(model, image_size=size_of(model.config.patch_size), packing=packing)
    if made_by not in _AUTOENCODERS:
        raise ValueError(
            f"{path}: expected a UniFlow, or an {' or '.join(_AUTOENCODERS)} of diffusers, got {shown(made_by)}"
        )
    autoencoder = _read_autoencoder(Path(folder), values, made_by)
    size = size_of(_stride(autoencoder.config))
    if size is None:
        trained = getattr(autoencoder.config, "sample_size", None)
        if trained is None:
            raise ValueError(f"image_size: expected height and width, which {path} does not say")
        check_integer(f"{path}: sample_size", trained, 1, _LARGEST_PICTURE)
        size = (trained, trained)
    return AutoencoderTokens(autoencoder, size, packing)


def _read_autoencoder(folder: Path, values: dict[str, Any], kind: str) -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"an {kind} needs diffusers: pip install 'uniflow-kernels[diffusers]'", name=error.name
        ) from None
    own = checked_values(values, str(folder / "config.json"))
    try:
        state = {_now_called(name): tensor for name, tensor in read_state(folder, "diffusion_pytorch_model").items()}
        autoencoder = outline(lambda: getattr(diffusers, kind).from_config(own), state, str(folder))
        assign_state(autoencoder, state, str(folder), torch.float32)
    except CheckpointError:
        raise
    except Exception as error:  # diffusers raises whatever its models do
        raise ValueError(f"{folder} holds no {kind} that diffusers can read: {short_reason(error)}") from None
    return autoencoder.float()


def _now_called(name: str) -> str:
    """The name that diffusers gives now to what it called otherwise in the attention of older autoencoders."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(\.attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name

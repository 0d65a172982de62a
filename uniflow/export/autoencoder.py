"""A UniFlow with the interface of diffusers' autoencoders, for generators that are written for one of these."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from uniflow.latent_set import ChannelStatistics, LatentSet
from uniflow.latents import check_tokenizer
from uniflow.model import UniFlow
from uniflow.normalization import denormalize, normalize
from uniflow.sampler import Sampler, start_of
from uniflow_kernels.ops.noise import integer_seed
from uniflow_kernels.solvers import Interval, Plan

try:
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "an autoencoder for diffusers needs it: pip install 'uniflow-kernels[diffusers]'", name=error.name
    ) from None

Generators = torch.Generator | list[torch.Generator]


class DiffusersAutoencoder(nn.Module):
    """Takes the place of an AutoencoderKL: pictures [B, 3, H, W] in [-1, 1] to latents [B, C, H/P, W/P] and back.

    Latents are standardised by the mean and deviation of each channel, so that a generator sees a variance of one, and
    `decode` undoes it; `config` therefore has a scaling_factor of 1, a shift_factor of 0, and no latents_mean.

    Args:
        model: the tokenizer; taken as it is, with its dtype and device.
        statistics: of the latents that the generator learns: a `LatentSet`, the folder of one, or the numbers.
        seed: of the decoder's noise where `decode` is given no generator; each call then has the same.
        steps, schedule, cfg, cfg_interval, solver, temperature, max_memory: as `UniFlow.decode` takes them.

    Raises:
        FileNotFoundError: if the folder holds no manifest of latents.
        LatentsError: if the statistics are missing, or of another model.
        ValueError: if they are of another number of channels; for settings that `UniFlow.decode` does not have.

    Attributes:
        config: what pipelines read: latent_channels, sample_size (of the pictures, in pixels), scaling_factor and
            others; patch_size is the tokenizer's. block_out_channels, by whose length pipelines tell that the patch is
            2^(length - 1), is there where the patch is a power of two.
    """

    def __init__(
        self,
        model: UniFlow,
        statistics: LatentSet | ChannelStatistics | str | Path,
        seed: int = 0,
        steps: int | None = None,
        schedule: str = "linear",
        cfg: float = 1.0,
        cfg_interval: Interval | None = None,
        solver: str = "euler",
        temperature: float = 1.0,
        max_memory: int | None = None,
    ) -> None:
        super().__init__()
        own = model.config
        plan = Plan(own.sampling_steps if steps is None else steps, schedule, solver, cfg, cfg_interval)
        plan.check(own.flow_times)
        self.model = model
        self.statistics = _statistics(statistics, model)
        self.seed = integer_seed(seed)
        self.sampler = Sampler(model, plan, temperature, max_memory)
        self.use_slicing = False
        patch = own.patch_size
        channels = {} if patch & (patch - 1) else {"block_out_channels": (own.hidden_size,) * patch.bit_length()}
        self.config = FrozenDict(
            in_channels=own.num_channels,
            out_channels=own.num_channels,
            latent_channels=own.latent_ch,
            sample_size=own.image_size,
            patch_size=patch,
            spatial_compression_ratio=patch,
            scaling_factor=1.0,
            shift_factor=0.0,
            latents_mean=None,
            latents_std=None,
            force_upcast=False,
            **channels,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of what is returned."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.model.device

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures to latents.

        Args:
            x: [B, 3, H, W] in [-1, 1], floating point, of sides that the patch divides.
            return_dict: a tuple of one if not.

        Returns:
            `latent_dist`, whose `mode()`, `mean` and `sample()` are the standardised latents [B, C, H/P, W/P]: it has
            no variance.

        Raises:
            TypeError: if the pictures are integers.
            ValueError: for another shape, or sides that the patch does not divide.
        """
        if not x.is_floating_point():
            raise TypeError(f"x: expected floating point pictures in [-1, 1], got {x.dtype}")
        images = normalize((x.float() + 1) / 2)
        parts = images.split(1) if self.use_slicing and len(images) > 1 else [images]
        latents = self.statistics.standardised(torch.cat([self.model.encode(part) for part in parts]))
        lines = x.shape[2] // self.model.config.patch_size
        latents = rearrange(latents, "b (h w) c -> b c h w", h=lines).to(self.dtype)
        # the logarithm of a variance that counts as zero
        found = DiagonalGaussianDistribution(torch.cat([latents, torch.zeros_like(latents)], 1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generators | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents to pictures.

        Args:
            z: [B, C, h, w], standardised, of any floating dtype.
            return_dict: a tuple of one if not.
            generator: gives the pictures' noise, or one for each picture; else it is that of `seed`.

        Returns:
            `sample`, [B, 3, h*P, w*P]: in [-1, 1] but for what the decoder overshoots, as with AutoencoderKL.

        Raises:
            TypeError: if the latents are integers.
            ValueError: for another shape, or not as many generators as pictures.
        """
        channels, patch = self.model.config.latent_ch, self.model.config.patch_size
        if z.ndim != 4 or z.shape[1] != channels:
            raise ValueError(f"z: expected latents [B, {channels}, h, w], got {list(z.shape)}")
        if not z.is_floating_point():
            raise TypeError(f"z: expected floating point latents, got {z.dtype}")
        size = z.shape[2] * patch, z.shape[3] * patch
        latents, seeds = self.statistics.restored(rearrange(z, "b c h w -> b (h w) c")), self._seeds(len(z), generator)
        each = 1 if self.use_slicing else max(1, len(z))
        images = torch.cat(
            [self.sampler(part, its, size) for part, its in zip(latents.split(each), seeds.split(each), strict=True)]
        )
        pictures = (denormalize(images.float()) * 2 - 1).to(self.dtype)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """decode(encode(sample)); the latents have no variance to sample from."""
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict, generator)

    def enable_slicing(self) -> None:
        """Encode and decode one picture at a time, in less memory: the same pictures."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Back to all at once."""
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Not offered, since tiles would change pictures.

        Raises:
            NotImplementedError: always; `max_memory` decodes line by line what a tiled decoder only comes near.
        """
        raise NotImplementedError("enable_tiling: expected max_memory=BYTES at construction, which changes no picture")

    def disable_tiling(self) -> None:
        """Nothing is tiled."""

    def _seeds(self, count: int, generator: Generators | None) -> Tensor:
        """Of the pictures' noise, int64 [count], on the model's device."""
        if not isinstance(generator, list):
            seed = self.seed if generator is None else None
            return start_of((count,), None, generator, seed, self.device)
        if len(generator) != count:
            raise ValueError(f"generator: expected {count}, one a picture, got {len(generator)}")
        return torch.cat([start_of((1,), None, each, None, self.device) for each in generator])


def _statistics(given: LatentSet | ChannelStatistics | str | Path, model: UniFlow) -> ChannelStatistics:
    if isinstance(given, str | Path):
        given = ChannelStatistics.read(given, model)
    elif isinstance(given, LatentSet):
        check_tokenizer(given.folder, given.manifest.tokenizer, given.manifest.fingerprint, model)
        given = given.statistics
    channels = model.config.latent_ch
    if not given.mean.shape == given.std.shape == (channels,):
        raise ValueError(
            f"statistics: expected mean and std of {channels} channels, got {list(given.mean.shape)} and "
            f"{list(given.std.shape)}"
        )
    return given

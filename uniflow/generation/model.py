"""The generator: a transformer over all latents of a picture that predicts where flow matching leads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uniflow.checkpoint import as_dtype, assign_state, chosen_weights, outline, read_state, write_state
from uniflow.float32_buffers import Float32Buffers
from uniflow.generation.config import FlowTransformerConfig
from uniflow.generation.layers import AdaptiveNorm, Block, Rotation, Stream
from uniflow.hub import local_folder
from uniflow.latent_set import ChannelStatistics
from uniflow.latents import LatentsError, why_not_of
from uniflow.model import UniFlow
from uniflow.transformer import RMSNorm
from uniflow_kernels import FlowHead
from uniflow_kernels.modules.flow_layers import TimestepEmbedding

TIME_SCALE = 1000.0  # what times in [0, 1] are multiplied by before they are embedded


class FlowTransformer(Float32Buffers):
    """The velocity of standardised latents on the way from noise (t = 0) to data (t = 1), under a class.

    Args:
        config: see `FlowTransformerConfig`.

    The mean and standard deviation of the latents' channels, `latent_mean` and `latent_std`, are part of it: it is
    trained on latents less the mean over the deviation, and what is drawn goes back the same way.

    Source: SiT (Ma et al. 2024), DiT's transformer on the linear path, with a token for each latent.
    """

    mark = "latent_proj.weight"  # see `UniFlow.mark`
    pretrained_parts: tuple[str, ...] = ()
    untrained_parts: tuple[str, ...] = ()
    float32_buffers = ("latent_mean", "latent_std")

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: FlowTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, channels = config.width, config.latent_channels
        self.latent_proj = nn.Linear(channels, width)
        self.time_embed = TimestepEmbedding(width)
        self.label_embed = None if config.classes is None else nn.Embedding(config.classes + 1, width)  # one for none
        learned = config.positions == "learned"
        self.position_embedding = nn.Parameter(torch.empty(config.tokens, width)) if learned else None
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp) for _ in range(config.depth))
        self.norm = AdaptiveNorm(width)
        self.head: nn.Linear | WideHead | FlowHead
        if config.head == "linear":
            self.head = nn.Linear(width, channels)
        elif config.head == "wide":
            self.head = WideHead(config)
        else:
            self.head = FlowHead(channels, config.head_width, channels, width, config.head_depth)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in DiT: Xavier for products, std 0.02 for embeddings, zero for modulations and the output, so that v = 0.

        The statistics are those of latents that are standardised.
        """
        start_products(self)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding, std=0.02)
        for part in (self.label_embed, *self.time_embed.mlp):
            if isinstance(part, (nn.Embedding, nn.Linear)):
                nn.init.normal_(part.weight, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
        else:
            self.head.reset_parameters()
        nn.init.zeros_(self.latent_mean)
        nn.init.ones_(self.latent_std)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.latent_proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.latent_proj.weight.dtype

    def layers(self) -> list[nn.Module]:
        """The blocks, those of a wide head too."""
        return [*self.blocks, *(self.head.blocks if isinstance(self.head, WideHead) else ())]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The velocity at x and t.

        Args:
            x: [B, N, C], noise and standardised latents mixed.
            t: [B], or one for all, []: in [0, 1]; 0 is noise.
            labels: int64 [B], from 0; the number of classes stands for none. Without them no picture has one.

        Returns:
            [B, N, C], an estimate of latents - noise, in the dtype of the parameters (under autocast in that one).

        Raises:
            ValueError: if a shape does not fit, or there are labels for a model without classes.
        """
        config = self.config
        if x.shape[1:] != (config.tokens, config.latent_channels):
            expected = f"[B, {config.tokens}, {config.latent_channels}]"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        if t.shape not in ((), x.shape[:1]):
            raise ValueError(f"t: expected a scalar or shape [{x.shape[0]}], got {tuple(t.shape)}")
        x = x.to(self.dtype)
        time = self.time_embed(TIME_SCALE * t).unsqueeze(-2)  # [B, 1, W], or [1, W]
        condition = nn.functional.silu(time + self._embedded(labels, x))
        rotation = None
        stream = self.latent_proj(x)
        if self.position_embedding is not None:
            stream = stream + self.position_embedding
        else:
            rotation = Rotation.of(config.grid, config.width // config.heads, x.device)
        state = Stream(stream)
        for block in self.blocks:
            state = block(state, condition, rotation)
        h = self.norm(state, condition)
        if isinstance(self.head, nn.Linear):
            return self.head(h)
        if isinstance(self.head, WideHead):
            return self.head(x, h, time)
        # what is the same for all tokens is computed once
        times = self.head.time_embed(TIME_SCALE * t).unsqueeze(-2)
        return self.head.from_embedding(x, times + self.head.cond_embed(h))

    def _embedded(self, labels: Tensor | None, x: Tensor) -> Tensor | float:
        if self.label_embed is None:
            if labels is not None:
                raise ValueError("labels: the model was made without classes, expected none")
            return 0.0
        if labels is None:
            labels = torch.full(x.shape[:1], self.label_embed.num_embeddings - 1, dtype=torch.int64, device=x.device)
        elif labels.shape != x.shape[:1]:
            raise ValueError(f"labels: expected shape [{x.shape[0]}], got {tuple(labels.shape)}")
        return self.label_embed(labels).unsqueeze(-2)

    # the latents' statistics

    @torch.no_grad()
    def set_statistics(self, statistics: ChannelStatistics) -> None:
        """Keep mean and standard deviation of each channel of the latents.

        Raises:
            ValueError: if they have another number of channels, or are not finite.
        """
        for name, value in (("mean", statistics.mean), ("std", statistics.std)):
            if value.shape != self.latent_mean.shape or not bool(value.isfinite().all()):
                raise ValueError(f"{name}: expected {self.config.latent_channels} finite numbers, got {value.tolist()}")
        self.latent_mean.copy_(statistics.mean)
        self.latent_std.copy_(statistics.std)

    def standardised(self, latents: Tensor) -> Tensor:
        """Latents [..., C] of the tokenizer less the mean, over the deviation; float32."""
        return ChannelStatistics(self.latent_mean, self.latent_std).standardised(latents)

    def restored(self, latents: Tensor) -> Tensor:
        """Back from `standardised`."""
        return ChannelStatistics(self.latent_mean, self.latent_std).restored(latents)

    # checkpoints

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        *,
        weights: str | None = None,
    ) -> FlowTransformer:
        """Read what `save_pretrained` wrote, in the dtype of the file if none is given; in evaluation mode.

        Args:
            folder: with config.json and model.safetensors, or OWNER/NAME on the Hub.
            device: where the parameters go.
            dtype: of the parameters, also by its name.
            weights: which model of a file that holds several, see `UniFlow.from_pretrained`.

        Raises:
            FileNotFoundError: if something is missing.
            NotADirectoryError: if it is a file.
            ValueError: if config.json describes no generator; for a dtype that weights cannot have.
            CheckpointError: if the weights are damaged or of another model.

        Warns:
            NotFiniteWarning: if weights are NaN or infinite.

        Nothing in the folder is executed, and nothing is downloaded but a repository that is named.
        """
        chosen = as_dtype(dtype, None)
        folder = local_folder(folder)
        config = FlowTransformerConfig.from_pretrained(folder)
        state = read_state(folder, mark=cls.mark, weights=weights)
        model = cls.outlined(config, state, str(folder))
        assign_state(model, state, str(folder), chosen)
        return model.to(device, chosen).eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `UniFlow.load_state_dict`."""
        return super().load_state_dict(chosen_weights(state_dict, self.mark, "state_dict"), strict, assign)

    @classmethod
    def outlined(cls, config: FlowTransformerConfig, state: Mapping[str, Tensor], source: str) -> FlowTransformer:
        """A model on the meta device, to be assigned; errors as of `uniflow.checkpoint.outline`."""
        return outline(lambda: cls(config), state, source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json; each file is whole or not there."""
        write_state(self, folder)
        self.save_config(folder)

    def save_config(self, folder: str | Path) -> None:
        """Write config.json alone."""
        self.config.save_pretrained(folder)

    def check_tokenizer(self, tokenizer: UniFlow) -> None:
        """Raise a LatentsError unless a tokenizer is the one whose latents this is a generator of, as far as is known.

        The message is one line that says in what they differ.
        """
        config = self.config
        if config.tokenizer is None or config.fingerprint is None:
            if tokenizer.config.latent_ch != config.latent_channels:
                raise LatentsError(
                    f"the generator draws latents of {config.latent_channels} channels, the tokenizer has "
                    f"{tokenizer.config.latent_ch}"
                )
        elif reason := why_not_of(config.tokenizer, config.fingerprint, tokenizer):
            raise LatentsError(f"the generator is of the latents of another tokenizer: {reason}")


class WideHead(nn.Module):
    """Blocks of another width behind the transformer's, which see the noisy tokens again; each token has a condition.

    Source: the decoder of DDT (Wang et al. 2025), wide and shallow as in RAE (Zheng et al. 2025).
    """

    def __init__(self, config: FlowTransformerConfig) -> None:
        super().__init__()
        width = config.head_width
        self.grid = config.grid if config.positions == "rotary" else None
        self.channels = width // config.wide_heads  # of a head of attention
        self.input_proj = nn.Linear(config.latent_channels, width)
        self.cond_proj = nn.Linear(config.width, width)
        self.blocks = nn.ModuleList(Block(width, config.wide_heads, config.mlp) for _ in range(config.head_depth))
        self.norm = AdaptiveNorm(width)
        self.linear = nn.Linear(width, config.latent_channels)

    def reset_parameters(self) -> None:
        """As those of the transformer: the modulations and the output are zero."""
        start_products(self)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, h: Tensor, time: Tensor) -> Tensor:
        """The noisy tokens [B, N, C], the transformer's states [B, N, W] and the time's embedding to [B, N, C]."""
        condition = nn.functional.silu(self.cond_proj(h + time))
        stream = Stream(self.input_proj(x))
        rotation = None if self.grid is None else Rotation.of(self.grid, self.channels, x.device)
        for block in self.blocks:
            stream = block(stream, condition, rotation)
        return self.linear(self.norm(stream, condition))


def start_products(model: nn.Module) -> None:
    """Xavier for the weights of all linear layers, zero for the modulations' and all biases; ones for norms."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith("modulation"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            module.reset_parameters()

"""UniFlow: encoder, latent, condition, flow decoder; parameter names and numbers of the official release."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uniflow.config import DECODER_FIELDS, GLOBAL_BLOCK_HEADS, UniFlowConfig
from uniflow.encoder import Embeddings, Encoder, LayerStack, embedded, patches_for, resize_position_embedding
from uniflow.encoding import ImageEncoder
from uniflow.explanation import explained, printed
from uniflow.flow_decoder import ChannelProjection, FlowDecoder, sincos_position_embedding
from uniflow.pretrained import (
    HuggingFaceEmbeddings,
    PretrainedEncoder,
    described_encoder,
    pretrained_encoder,
    take_tensors,
)
from uniflow.recomputation import KEEPS, Recomputation, count_kept, fit, memory_of
from uniflow.resizing import Resizable
from uniflow.sampler import Decoder, Sampler
from uniflow.stored import Stored
from uniflow.transformer import RMSNorm, TransformerLayer, kernel_states, last_of
from uniflow_kernels.diagnosis import OpReport
from uniflow_kernels.ops.fp8_linear import check_precision
from uniflow_kernels.ops.patches import patch_grid
from uniflow_kernels.solvers import Interval, Plan
from uniflow_kernels.torch_private import has_autocast


class UniFlow(Stored, Resizable):
    """The tokenizer: images to latents and back.

    Images are normalised (see `uniflow.normalize`), [B, C, H, W], of any size that the patch divides; at another
    size than the trained one, the three position embeddings are interpolated.

    Args:
        config: see `UniFlowConfig`.
        pretrained: an encoder that fits the config, taken as it is; `from_encoder` makes both. By default a new one,
            of the kind that `config.encoder` describes if it does.

    Source: `UniFlowVisionModel` of the official release, same state_dict.
    """

    embeddings: Embeddings | HuggingFaceEmbeddings
    encoder: LayerStack

    pretrained_parts = ("embeddings.", "encoder.")  # parameters whose names start so may come from a trained encoder
    untrained_parts: tuple[str, ...] = ()
    encoding_parts: tuple[str, ...] = ("embeddings", "encoder", "chal_proj")  # submodules that decoding never calls
    decoding_parts: tuple[str, ...] = ("chal_unproj", "global_blocks", "flow_head")  # and encoding

    activation_memory: int | float | None = None  # of what layers keep, see `gradient_checkpointing_enable`
    _planned: tuple[Any, ...] | None = None

    def __init__(self, config: UniFlowConfig, pretrained: PretrainedEncoder | None = None) -> None:
        super().__init__(config)
        width = config.vit_hidden_size
        if pretrained is None and config.encoder is not None:
            pretrained = described_encoder(config)
        if pretrained is None:
            self.embeddings = Embeddings(config)
            self.encoder = Encoder(config)
        self.chal_proj = ChannelProjection(width, width, config.latent_ch)
        self.chal_unproj = ChannelProjection(config.latent_ch, width, width)
        self.global_block_pos_embed = nn.Parameter(torch.empty(1, config.tokens, width))
        self.global_blocks = nn.ModuleList(
            TransformerLayer(width, GLOBAL_BLOCK_HEADS, 4 * width, allow_flash_attn=config.use_flash_attn)
            for _ in range(config.global_blocks_depth)
        )
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, config.tokens, width))
        self.flow_head = FlowDecoder(config)
        self._start()
        if pretrained is not None:
            self.embeddings, self.encoder = pretrained.embeddings, pretrained.encoder

    def reset_parameters(self) -> None:
        """Set all parameters and buffers as in a new model, whatever they held, also after `to_empty`.

        An encoder that `config.encoder` describes is made again; another one of another make stays as it is.
        """
        self.flow_head.net.reset_parameters()
        if self.config.encoder is not None:
            made = described_encoder(self.config)
            take_tensors(self.embeddings, made.embeddings)
            take_tensors(self.encoder, made.encoder)
        self._start()

    def _start(self) -> None:
        """Truncated normal products, sin-cos positions for the decoder; the flow head starts at v = 0 (as in MAR)."""
        std, factor = self.config.initializer_range, self.config.initializer_factor
        embeddings = getattr(self, "embeddings", None)
        elsewhere = ("flow_head.",) if isinstance(embeddings, Embeddings) else ("flow_head.", *self.pretrained_parts)
        for name, module in self.named_modules():
            if name.startswith(elsewhere):
                continue
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, TransformerLayer):
                for scale in filter(torch.is_tensor, (module.ls1, module.ls2)):
                    nn.init.constant_(scale, factor)
        if isinstance(embeddings, Embeddings):
            nn.init.trunc_normal_(embeddings.class_embedding, std=std)
            nn.init.trunc_normal_(embeddings.position_embedding, std=std)
        self._start_positions()

    def _start_positions(self) -> None:
        if self.decoder_pos_embed.is_meta:
            return
        positions = sincos_position_embedding(
            self.config.vit_hidden_size, self.config.image_size // self.config.patch_size
        )
        with torch.no_grad():
            self.global_block_pos_embed.copy_(positions)
            self.decoder_pos_embed.copy_(positions)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; inputs are brought to it."""
        return self.decoder_pos_embed.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.decoder_pos_embed.device

    @property
    def precision(self) -> str | None:
        """Of the products, "fp8"; None for that of the dtype."""
        return self.flow_head.net.precision

    def at_precision(self, precision: str | None) -> UniFlow:
        """A model on the same parameters whose products are in another precision, for inference.

        Args:
            precision: "fp8" for the layers of the encoder, the global blocks and the flow head's modulations in 8-bit
                floats (docs/fp8.md); None for the model itself.

        A change of the parameters' values is a change of both. Modules that are replaced later, and parameters, are not
        the other's. Its state_dict, and what it saves, are those of full precision.

        Raises:
            ValueError: for a precision that is unknown, or that the device does not have.
        """
        check_precision(precision, self.device, self.config.head_width)
        if precision is None or precision == self.precision:
            return self
        return self.on_same_parameters().lower(precision)

    def on_same_parameters(self) -> UniFlow:
        """A model of modules of its own, on the very parameters and buffers of this one."""
        return copy.deepcopy(self, {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())})

    def explain(self) -> str:
        """What its parts run on, on its device and in its dtype, and why not on something faster: a line each."""
        return printed(self.parts())

    def parts(self) -> list[OpReport]:
        """The same, part by part."""
        return explained(self.embeddings, self.layers(), self.flow_head.net, self.device, self.dtype)

    def layers(self) -> list[nn.Module]:
        """The transformer layers, which FSDP may gather one by one; the flow head's blocks run as one operation."""
        return [*self.encoder.layers, *self.global_blocks]

    def hidden_states(self, images: Tensor) -> list[Tensor]:
        """The encoder's L+1 states [B, 1+N, D]: the embeddings, then each layer's output; the class token first.

        An encoder of another make (`from_encoder`) has `prefix_tokens` tokens in the place of the one.
        """
        return self.encoder(*self._embed(images))

    def layer_states(self, images: Tensor, patches: Tensor | None = None) -> Iterator[Tensor]:
        """`hidden_states` without the embeddings, each layer's output computed when it is asked for.

        `patches` as `encode` takes them.
        """
        return self.encoder.states(*self._embed(images, patches))

    def compared_states(
        self, images: Tensor, patches: Tensor | None, features: Iterator[Tensor], skip_tokens: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`layer_states` beside a teacher's, see `uniflow.encoder.LayerStack.compared`."""
        return self.encoder.compared(*self._embed(images, patches), features=features, skip_tokens=skip_tokens)

    def patches(self, images: Tensor) -> Tensor | None:
        """Those of images [B, C, H, W], [B, N, C*P*P] in their dtype, where `encode` is made of them; else None."""
        self.checked_images(images)
        return patches_for(self.embeddings, images)

    def _embed(self, images: Tensor, patches: Tensor | None = None) -> tuple[Tensor, ...]:
        """The embeddings [B, prefix + N, D], and the positions that the layers take beside them."""
        images = self.checked_images(images)
        if self.activation_memory is not None and torch.is_grad_enabled():
            self._recompute_for(images)
        return embedded(self.embeddings, images, patches)

    @property
    def prefix_tokens(self) -> int:
        """How many tokens a hidden state has before those of the patches: class and register tokens."""
        return self.embeddings.prefix_tokens

    def encode(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """Images to latents.

        Args:
            images: [B, C, H, W], normalised, float; brought to the model's dtype.
            patches: what the method `patches` gave of them, if something else needs that too.

        Returns:
            [B, N, latent_ch] with N = (H/P)*(W/P) tokens in raster order.

        Raises:
            TypeError: if the images are integers.
            ValueError: if the shape is not [B, C, H, W] or the patch does not divide height and width.

        An encoder of another make may have been trained at a size that its patch does not divide (SigLIP's 384 by 14):
        of images of that size the rest is left out, as the encoder itself does.
        """
        return self.latents(self.encoder.last(*self._embed(images, patches)))

    def compile_encoder(
        self, batch: int, size: tuple[int, int] | None = None, precision: str | None = None
    ) -> ImageEncoder:
        """An encoder from images to latents whose work is prepared: on CUDA it is captured here.

        Args:
            batch: images at a time; it takes others too.
            size: (H, W) of the images in pixels; the trained size if not given.
            precision: as `compile_decoder` takes it.

        Raises:
            ValueError: for a batch below 1, a size that is no multiple of the patch, or a precision that is unknown or
                cannot serve.
        """
        size = (self.config.image_size, self.config.image_size) if size is None else size
        return ImageEncoder(self.at_precision(precision), batch, size)

    def latents(self, last_hidden_state: Tensor) -> Tensor:
        """The encoder's last state [B, 1+N, D] to latents [B, N, latent_ch]; the class token is left out."""
        return self.chal_proj(last_hidden_state[:, self.prefix_tokens :])

    def condition(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Latents to what the flow head is conditioned on.

        Args:
            latents: [B, N, latent_ch].
            size: (H, W) of the image in pixels; without it the image is square.

        Returns:
            [B, N, D].

        Raises:
            TypeError: if they are not floating point.
            ValueError: if the shape does not fit the model or `size`.
        """
        self.check_latents(latents)
        grid = patch_grid(latents.shape[1], self.config.patch_size, size)
        x = self.chal_unproj(latents.to(self.dtype), resize_position_embedding(self.global_block_pos_embed, grid))
        fused = kernel_states(self.global_blocks, x)
        if fused is not None:
            x = last_of(fused, x)
        else:
            for block in self.global_blocks:
                x = block(x)
        return x + resize_position_embedding(self.decoder_pos_embed, grid)

    def check_latents(self, latents: Tensor) -> None:
        """Raise an error unless they are [B, N, latent_ch], float."""
        _refuse_tracing()
        if latents.ndim != 3 or latents.shape[-1] != self.config.latent_ch:
            raise ValueError(f"latents: expected shape [B, N, {self.config.latent_ch}], got {tuple(latents.shape)}")
        _check_float(latents=latents)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The flow head's velocity at x and t.

        Args:
            x: [B, N, C*P*P], on the way from noise to pixels.
            t: [B], [B, N] or a scalar, in [0, 1]; 0 is noise. A flow head of two times is asked where both are t.
            condition: [B, N, D], from `condition`.

        Returns:
            [B, N, C*P*P], an estimate of image - noise.

        Raises:
            TypeError: if x or the condition is not floating point, or t is complex.
            ValueError: if the shapes do not fit together.
        """
        _refuse_tracing()
        width = self.config.vit_hidden_size
        if condition.ndim != 3 or condition.shape[-1] != width:
            raise ValueError(f"condition: expected shape [B, N, {width}], got {tuple(condition.shape)}")
        expected = (*condition.shape[:2], self.config.patch_values)
        if x.shape != expected:
            raise ValueError(f"x: expected shape {expected}, one row of pixels a token, got {tuple(x.shape)}")
        if t.shape not in ((), x.shape[:1], x.shape[:2]):
            raise ValueError(
                f"t: expected a scalar, [{x.shape[0]}] or [{x.shape[0]}, {x.shape[1]}], got {tuple(t.shape)}"
            )
        _check_float(x=x, condition=condition)
        if t.is_complex():
            raise TypeError(f"t: expected real numbers, got {t.dtype}")
        t = t.unsqueeze(-1) if t.ndim == 1 else t
        return self.flow_head.velocity(x.to(self.dtype), t, condition)

    def decode(
        self,
        latents: Tensor,
        steps: int | None = None,
        schedule: str = "linear",
        cfg: float = 1.0,
        cfg_interval: Interval | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        size: tuple[int, int] | None = None,
        solver: str = "euler",
        temperature: float = 1.0,
        max_memory: int | None = None,
    ) -> Tensor:
        """Latents to images, in steps from noise.

        Every picture has a seed, and its noise is `uniflow_kernels.seeded_noise` of that, made when it is needed: the
        same for a seed whatever the batch, `max_memory`, device and backend.

        Args:
            latents: [B, N, latent_ch].
            steps: number of steps; the config's `num_sampling_steps` if not given.
            schedule: "linear", "pow_p" or "shifted_a", see `uniflow_kernels.solvers.schedule_steps`.
            cfg: guidance scale; 1 is none (and costs none).
            cfg_interval: the sigmas at which to guide, see `uniflow_kernels.solvers.guides_at`.
            noise: [B, N, C*P*P] to start from, instead of seeds.
            generator: to draw the seeds with, one picture after the other, on any device: batches that follow each
                other have the noise that they would have as one. If none of the three is given, PyTorch's default one
                for the model's device.
            seed: in [0, 2^63), short for `torch.Generator().manual_seed(seed)`; or the pictures' own, int64 [B].
            size: (H, W) of the images in pixels; without it they are square.
            solver: "euler", or "heun" or "midpoint", which evaluate the flow head twice in a step; of a flow head of
                two times "euler" alone.
            temperature: what the noise is multiplied by.
            max_memory: bytes that may be held at a time beside weights, latents, images and noise that is given;
                pictures, or lines of patches of one picture, are then decoded one after the other as needed. No bound
                if not given.

        Returns:
            [B, C, H, W], normalised as the encoder's images are; differentiable, so use torch.inference_mode() if no
            gradient is wanted.

        Raises:
            TypeError: if latents, noise or seeds have a dtype that does not fit, or the generator is none.
            ValueError: if a shape does not fit, for an unknown schedule or solver, a seed out of range, more than one
                of noise, generator and seed, or memory that is not enough.
        """
        sampler = Sampler(self, self._plan(steps, schedule, solver, cfg, cfg_interval), temperature, max_memory)
        return sampler(latents, sampler.start(latents, size, noise, generator, seed), size)

    def compile_decoder(
        self,
        batch: int,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        schedule: str = "linear",
        cfg: float = 1.0,
        cfg_interval: Interval | None = None,
        solver: str = "euler",
        temperature: float = 1.0,
        dtype: torch.dtype = torch.uint8,
        max_memory: int | None = None,
        precision: str | None = None,
    ) -> Decoder:
        """A decoder whose settings are fixed and whose work is prepared: on CUDA it is captured here.

        Args:
            batch: pictures at a time; it takes others too.
            size: (H, W) of the pictures in pixels; the trained size if not given.
            steps, schedule, cfg, cfg_interval, solver, temperature, max_memory: as `decode` takes them.
            dtype: of the pictures: torch.uint8, or a floating one for values in [0, 1].
            precision: "fp8" for products in 8-bit floats, see `at_precision`; that with which the model was read if
                not given.

        Returns:
            A decoder from latents to pictures, not normalised.

        Raises:
            TypeError: for a dtype that pictures cannot have.
            ValueError: for a batch below 1, a size that is no multiple of the patch, memory that is not enough, a
                precision that is unknown or cannot serve, and as `decode`.
        """
        plan = self._plan(steps, schedule, solver, cfg, cfg_interval)
        model = self.at_precision(precision)
        size = (self.config.image_size, self.config.image_size) if size is None else size
        return Decoder(Sampler(model, plan, temperature, max_memory, dtype), batch, size)

    def _plan(self, steps: int | None, schedule: str, solver: str, cfg: float, cfg_interval: Interval | None) -> Plan:
        plan = Plan(self.config.sampling_steps if steps is None else steps, schedule, solver, cfg, cfg_interval)
        plan.check(self.config.flow_times)
        return plan

    def for_intervals(self) -> UniFlow:
        """A copy to be tuned for few steps: its flow head has two times, see `FlowHead.for_intervals`."""
        model = copy.deepcopy(self)
        model.config.flow_times = 2
        model.flow_head.net = model.flow_head.net.for_intervals()
        return model

    def forward(self, images: Tensor, **sampling: Any) -> Tensor:
        """Reconstruct images: decode(encode(images)) at their own size; keyword arguments as in `decode`."""
        patch = self.config.patch_size
        height, width = (extent // patch * patch for extent in images.shape[-2:])
        return self.decode(self.encode(images), size=(height, width), **sampling)

    def gradient_checkpointing_enable(
        self, enable: bool = True, flow_head: bool = True, memory: int | str | None = None
    ) -> None:
        """Recompute layers in the backward pass instead of keeping their activations: the same numbers, less memory.

        Args:
            enable: whether the encoder's layers and the global blocks are recomputed.
            flow_head: whether the flow head's blocks are, too.
            memory: bytes that those layers and blocks may hold at a time, as a number or as in "12GB", or the share of
                what they would hold without, as in "50%". They are then recomputed only as far as it takes, what costs
                least first, see `recomputation`. All of them altogether if not given.

        Raises:
            ValueError: for a memory that is none. One that is not enough is an error where images are encoded.
        """
        self.activation_memory = None
        if enable and memory is not None:
            self.activation_memory = memory_of(memory) if isinstance(memory, str) else memory
            if self.activation_memory <= 0:
                raise ValueError(f"memory: expected more than 0 bytes, got {memory}")
        layer: Any
        for layer in self.layers():
            layer.keeps = "nothing" if enable and memory is None else "everything"
        self._planned = None
        self.flow_head.net.grad_checkpointing = enable and flow_head

    def recomputation(self, shape: Sequence[int]) -> Recomputation:
        """What the encoder's layers and the global blocks keep for the backward pass, counted by their shapes.

        As `gradient_checkpointing_enable` was told, and as many bytes as autocast makes it where this is called. It is
        asked anew where images of another shape are encoded, by a model that is not compiled as a whole.

        Args:
            shape: of the images, [B, C, H, W].

        Raises:
            ValueError: if the memory is not enough, saying how much is.
        """
        batch, channels, height, width = shape
        tokens = height // self.config.patch_size * (width // self.config.patch_size)
        with torch.no_grad():
            one = torch.empty(1, channels, height, width, dtype=self.dtype, device=self.device)
            positions = self.embeddings.positions(one)
        of_encoder = (batch, self.prefix_tokens + tokens, self.config.hidden_size)
        of_blocks = (batch, tokens, self.config.vit_hidden_size)
        how = self.dtype, self.device
        counted = count_kept(list(self.encoder.layers), of_encoder, positions, *how)
        counted += count_kept(list(self.global_blocks), of_blocks, (), *how)
        whole = sum(each[0] for each in counted)
        memory = whole if self.activation_memory is None else self.activation_memory
        budget = int(memory * whole) if isinstance(memory, float) else memory
        frozen = not _learns(self.embeddings)
        for number, layer in enumerate(self.encoder.layers):
            frozen = frozen and not _learns(layer)
            if frozen:  # nothing is kept
                counted[number] = [0] * len(KEEPS)
        return fit(counted, budget)

    def _recompute_for(self, images: Tensor) -> None:
        """Have layers keep what the memory allows for such images; counted where it was not for the ones before."""
        if torch.compiler.is_compiling() or images.is_meta:
            return
        kind = images.device.type
        trained = tuple(_learns(part) for part in (self.embeddings, *self.encoder.layers))
        asked = (images.shape, trained, has_autocast(kind) and torch.is_autocast_enabled(kind))
        layer: Any
        if asked != self._planned:
            for layer, keeps in zip(self.layers(), self.recomputation(images.shape).keeps, strict=True):
                layer.keeps = keeps
            self._planned = asked

    @classmethod
    def from_encoder(
        cls,
        encoder: str | Path | nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        weights: str | None = None,
        image_size: int | None = None,
        drop_path_rate: float | None = None,
        **decoder: Any,
    ) -> UniFlow:
        """A tokenizer around an encoder that understands already; everything behind the encoder is new.

        Args:
            encoder: see `uniflow.pretrained.pretrained_encoder`; a module is taken as it is, not copied.
            mean, std: what the encoder's images are normalised with, if its folder does not say it; the tokenizer's are
                still those of `normalize`.
            weights: which of several models in the folder's file, as `from_pretrained` takes it.
            image_size: what to train at, in pixels, instead of the encoder's own, see `resize`.
            drop_path_rate: instead of the encoder's own, see `set_drop_path_rate`.
            decoder: fields of `UniFlowConfig` that are not about the encoder, such as latent_ch, global_blocks_depth
                and num_decoder_layers.

        Raises:
            TypeError: for a keyword that is no such field.
            ValueError: if the encoder cannot be used, saying why.

        It is saved and loaded like any other. The official code reads it if the encoder is of the InternViT kind.
        """
        pretrained = pretrained_encoder(encoder, mean, std, weights)
        for name in decoder:
            if name not in DECODER_FIELDS:
                raise TypeError(
                    f"from_encoder: expected fields of the decoder ({', '.join(DECODER_FIELDS)}), got {name}"
                )
        model = cls(UniFlowConfig(**{**pretrained.fields, **decoder}), pretrained)
        if drop_path_rate is not None:
            model.set_drop_path_rate(drop_path_rate)
        if image_size is not None:
            model.resize(image_size)
            model._start_positions()  # nothing has been learnt there yet
        return model

    def checked_images(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in the model's dtype, as they are encoded; errors as of `encode`."""
        _refuse_tracing()
        config = self.config
        if images.ndim != 4 or images.shape[1] != config.num_channels:
            raise ValueError(f"images: expected shape [B, {config.num_channels}, H, W], got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images: expected normalised floats (see uniflow.normalize), got {images.dtype}")
        height, width = images.shape[-2:]
        if height == 0 or width == 0 or height % config.patch_size or width % config.patch_size:
            if height == width == getattr(self.embeddings, "image_size", None):  # whose own patch leaves a rest
                return images[..., : config.image_size, : config.image_size].to(self.dtype)
            raise ValueError(
                f"images: height and width must be multiples of the patch ({config.patch_size}), got {height}x{width}"
            )
        return images.to(self.dtype)


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _check_float(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")


def _refuse_tracing() -> None:
    if torch.jit.is_tracing():
        raise NotImplementedError("torch.jit.trace: would keep the sizes of one input; take torch.export.export")

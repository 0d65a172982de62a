"""UniFluid: a language model whose sequences also hold continuous image tokens and features of pictures.

To draw, the tokens of a picture come after its text in a random order, in steps of one or several. Each stands in the
sequence twice: as a query, which knows its place and sees the text and the tokens of earlier steps, and whose state
conditions the head; and as content, which the queries of later steps see.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow.checkpoint import as_dtype, assign_state, chosen_weights, outline, read_state, write_state
from uniflow.float32_buffers import Float32Buffers
from uniflow.hub import local_folder
from uniflow.pretrained import take_tensors
from uniflow.unifluid.adapters import add_adapters, is_of_adapter, merge_adapters
from uniflow.unifluid.attention import NEVER, Sight
from uniflow.unifluid.backbone import (
    attend,
    check_backbone,
    embedding_scale,
    head_and_embedding,
    layers_of,
    new_backbone,
)
from uniflow.unifluid.config import FEW_STEPS, UniFluidConfig
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.places import Grid, GridEmbedding
from uniflow.unifluid.slots import FEATURES, TOKENS
from uniflow.unifluid.texts import ids_fingerprint, read_text_tokenizer
from uniflow_kernels import FlowHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXT_TOKENIZER = "text_tokenizer"  # folder in a checkpoint


class Slots(NamedTuple):
    """A part of a sequence. A slot sees itself, and every slot whose `visible` is at most its own `sees`.

    Attributes:
        embedded: [B, S, D].
        position: for the transformer's position embedding, int64 [B, S].
        visible: from when on it is seen, int64 [B, S].
        sees: up to when it sees, int64 [B, S].
    """

    embedded: Tensor
    position: Tensor
    visible: Tensor
    sees: Tensor


class UniFluid(Float32Buffers):
    """One transformer for text, pictures that are read and pictures that are drawn.

    Args:
        config: see `UniFluidConfig`.
        text_tokenizer: of the transformers package; saved with the model.
        backbone: a language model of the transformers package that fits the config, taken as it is; by default a new
            one.
        vision: its own encoder of pictures, taken as it is, for a config with `vision_encoder`; None for others.

    Raises:
        ImportError: if the transformers package is not installed, or the peft package for a config with `lora`.
        ValueError: if the encoder does not fit the config; if the tokenizer has more ids than the transformer, or is
            another than the config knows; for a language model that cannot serve, see
            `uniflow.unifluid.backbone.check_backbone`.

    Source: UniFluid (Fan et al. 2025); queries with the place of their target as in RandAR, steps as in MAR.
    """

    mark = "token_proj.weight"  # see `UniFlow.mark`
    pretrained_parts = ("backbone.",)
    untrained_parts: tuple[str, ...] = ()  # see `train_for`
    float32_buffers = ("token_mean", "token_std")
    time_scale = 1000.0  # the head is trained on 1000 t

    token_mean: Tensor
    token_std: Tensor

    def __init__(
        self,
        config: UniFluidConfig,
        text_tokenizer: PreTrainedTokenizerBase,
        backbone: PreTrainedModel | None = None,
        vision: VisionFeatures | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.text_tokenizer = text_tokenizer
        self.backbone: Any = new_backbone(config.backbone) if backbone is None else backbone
        check_backbone(self.backbone)
        if config.lora is not None:
            add_adapters(self.backbone, config.lora)
        own = self.backbone.config
        if len(text_tokenizer) > own.vocab_size:
            raise ValueError(
                f"text_tokenizer: has {len(text_tokenizer)} ids, more than the vocab_size of the backbone "
                f"({own.vocab_size})"
            )
        if config.text_tokenizer not in (None, ids_fingerprint(text_tokenizer)):
            raise ValueError("text_tokenizer: has other ids than the one that the model was trained with")
        width, channels = own.hidden_size, config.token_channels
        self.token_proj = nn.Linear(channels, width)
        self.place_embedding: Any = (
            nn.Parameter(torch.empty(config.tokens, width))
            if config.grids is None
            else GridEmbedding(config.grids, width)
        )
        self.query_embedding = nn.Parameter(torch.empty(width))
        self.vision = None if vision is None else vision.unfreeze()
        _check_own_vision(config, vision)
        self.vision_proj = _projection(config, width)
        out_channels = 2 * channels if config.head == "ddpm" else channels
        times = 2 if config.head in FEW_STEPS else 1
        self.source_embedding = nn.Parameter(torch.empty(width)) if config.sources in ("tokens", "both") else None
        self.head = FlowHead(channels, config.head_width, out_channels, width, config.head_depth, times=times)
        self.register_buffer("token_mean", torch.zeros(channels))
        self.register_buffer("token_std", torch.ones(channels))
        self._head, self._embedding = (f"backbone.{name}" for name in head_and_embedding(self.backbone))
        self.register_state_dict_post_hook(_leave_out_what_is_tied)
        self.register_load_state_dict_pre_hook(_give_what_is_tied)
        self.untrained_parts = self._beside_adapters()
        self._start()

    def reset_parameters(self) -> None:
        """Set all parameters and buffers as in a new model, those of the backbone too, also after `to_empty`.

        A vision encoder of its own stays as it is: it is a pretrained one.
        """
        new = new_backbone(self.config.backbone)
        if self.config.lora is not None:
            add_adapters(new, self.config.lora)
        take_tensors(self.backbone, new)
        self._start()

    def _start(self) -> None:
        """What goes into the transformer begins with the spread of its text embeddings; the backbone stays as it is."""
        std = getattr(self.backbone.config, "initializer_range", 0.02) * embedding_scale(self.backbone)
        of_vision = () if self.vision_proj is None else self.vision_proj.modules()
        for projection in (self.token_proj, *(part for part in of_vision if isinstance(part, nn.Linear))):
            nn.init.normal_(projection.weight, std=std / projection.in_features**0.5)
            nn.init.zeros_(projection.bias)
        of_places = self.place_embedding
        if isinstance(of_places, GridEmbedding):
            of_places.start(std)
            of_places = None
        for embedding in (of_places, self.query_embedding, self.source_embedding):
            if embedding is not None:
                nn.init.normal_(embedding, std=std)
        self.head.reset_parameters()
        nn.init.zeros_(self.token_mean)
        nn.init.ones_(self.token_std)

    def for_intervals(self, head: str) -> UniFluid:
        """A copy whose head is to be tuned for few steps; see `FlowHead.for_intervals`.

        Args:
            head: "mean_flow" or "self_distillation".

        Raises:
            ValueError: for another head, or of a model whose head predicts noise.
        """
        if head not in FEW_STEPS or self.config.head == "ddpm":
            raise ValueError(
                f"head: expected one of {', '.join(FEW_STEPS)} after flow, got {head!r} after {self.config.head}"
            )
        model = copy.deepcopy(self)
        model.config = replace(self.config, head=head)
        model.head = model.head.for_intervals()
        return model

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.query_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.query_embedding.dtype

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """How the names of the parameters of a vision encoder of its own begin; none without one."""
        return () if self.vision is None else ("vision.",)

    def layers(self) -> list[nn.Module]:
        """The layers of the transformer, and of a vision encoder of its own."""
        return [*layers_of(self.backbone), *([] if self.vision is None else self.vision.encoder.layers)]

    def gradient_checkpointing_enable(self, enable: bool = True, flow_head: bool = True) -> None:
        """Recompute the activations of all `layers`, and of the head's blocks, in the backward pass.

        Raises:
            ValueError: if the transformer's layers cannot.
        """
        # older versions of the package say gradient
        kept = "activation" if hasattr(self.backbone, "activation_checkpointing_enable") else "gradient"
        if not enable:
            getattr(self.backbone, f"{kept}_checkpointing_disable")()
        else:
            getattr(self.backbone, f"{kept}_checkpointing_enable")({"use_reentrant": False})
        layer: Any
        for layer in () if self.vision is None else self.vision.encoder.layers:
            layer.keeps = "nothing" if enable else "everything"
        self.head.grad_checkpointing = enable and flow_head

    def train_for(self, drawing: bool, reading: bool) -> None:
        """Leave out of the training what data of one kind have no use for: it stays as it is, and needs no moments."""
        to_draw = ("token_proj.", "place_embedding", "query_embedding", "source_embedding", "head.")
        to_read: tuple[str, ...] = (self._head.removesuffix("weight"),)  # a tied one has the text embedding's name
        if self.config.sources not in ("features", "both"):
            to_read += ("vision_proj.",)
        self.untrained_parts = (() if drawing else to_draw) + (() if reading else to_read) + self._beside_adapters()

    def _beside_adapters(self) -> tuple[str, ...]:
        """The backbone's own parameters, where adapters are trained in their place."""
        if self.config.lora is None:
            return ()
        names = (name for name, _ in self.backbone.named_parameters() if not is_of_adapter(name))
        return tuple(f"backbone.{name}" for name in names)

    def merge_adapters(self) -> None:
        """Make a model with adapters a plain one, in place: the same outputs, but for rounding.

        Raises:
            ValueError: if it has none.
        """
        if self.config.lora is None:
            raise ValueError("lora: the model has no adapters")
        merge_adapters(self.backbone)
        self.config = replace(self.config, lora=None)
        self.untrained_parts = ()

    # image tokens and their statistics

    @torch.no_grad()
    def set_statistics(self, tokens: Tensor) -> None:
        """Keep mean and standard deviation of each channel of an image tokenizer's tokens [..., C].

        Raises:
            ValueError: if they have another number of channels, or one of them never changes.
        """
        if tokens.shape[-1] != self.config.token_channels:
            raise ValueError(f"tokens: expected shape [..., {self.config.token_channels}], got {tuple(tokens.shape)}")
        rows = tokens.flatten(0, -2).double()
        std = rows.std(0)
        if not bool((std > 0).all()):
            raise ValueError(f"tokens: expected channels that vary, got standard deviations {std.tolist()}")
        self.token_mean.copy_(rows.mean(0))
        self.token_std.copy_(std)

    def normalized(self, tokens: Tensor) -> Tensor:
        """An image tokenizer's tokens [..., C] with mean 0 and standard deviation 1, as the model works on them."""
        return (tokens - self.token_mean) / self.token_std

    def denormalized(self, tokens: Tensor) -> Tensor:
        """The reverse of `normalized`."""
        return tokens * self.token_std + self.token_mean

    # reading

    def answer_logits(self, features: Tensor, ids: Tensor, real: Tensor, last: int) -> Tensor:
        """What the model expects for the last ids of texts about pictures.

        Args:
            features: [T, M, vision_channels], of the tiles of the pictures of all rows, one after the other.
            ids: int64 [B, T], padded; where features stand, `uniflow.unifluid.slots.FEATURES`.
            real: bool [B, T], False for padding.
            last: A, how many of the ids are to be predicted, less than T.

        Returns:
            Logits [B, A, V]: row j is what is expected in the place of ids[:, T - A + j], from what stands before it.

        Raises:
            ValueError: if the model reads no pictures, there are not as many features as slots (asked on a CPU), or the
                sequence is longer than the transformer's context.
        """
        embedded, mask = self.question(features, ids, real)
        position = mask.cumsum(1).sub_(1).clamp_(min=0)
        logits = self.backbone(
            inputs_embeds=embedded, attention_mask=mask, position_ids=position, logits_to_keep=last + 1, use_cache=False
        ).logits
        return logits[:, :-1]

    def question(self, features: Tensor, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Features and text as the transformer's inputs: embeddings [B, T, D] and their mask, int64 [B, T].

        Arguments and errors as of `answer_logits`.
        """
        self.check_context(ids.shape[1])
        if ids.device.type == "cpu":
            self.check_slots(ids, features)
        return self._embed(ids, features), real.long()

    # drawing

    def draw_states(
        self,
        tokens: Tensor,
        ids: Tensor,
        real: Tensor,
        order: Tensor,
        groups: Tensor,
        features: Tensor | None = None,
        clean: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """What the head is conditioned on, for all tokens of pictures that are known, as in training.

        Args:
            tokens: [B, N, C], normalised, in raster order.
            ids: int64 [B, T], the text, padded, with the slots of sources before it, see `uniflow.unifluid.slots`.
            real: bool [B, T], False for padding.
            order: int64 [B, N], see `uniflow.unifluid.orders.draw_orders`.
            groups: int64 [B, N], rising: the step of each token of `order`, from 0.
            features: [P, M, vision_channels] of the sources of all rows, one after the other.
            clean: [P, N, C], their image tokens, normalised, in raster order.
            grid: lines of the pictures' tokens, and tokens a line; the config's if not given.

        Returns:
            [B, N, D], in the order of `order`.

        Raises:
            ValueError: if the shapes do not fit together, there are not as many features or tokens of sources as slots
                (asked on a CPU), or the context is too long; for a grid that the model does not draw.
        """
        grid = self.config.known_grid(grid)
        shape = (len(ids), grid[0] * grid[1])
        if tokens.shape != (*shape, self.config.token_channels):
            raise ValueError(
                f"tokens: expected shape {(*shape, self.config.token_channels)}, got {tuple(tokens.shape)}"
            )
        for name, value in (("order", order), ("groups", groups)):
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        ordered = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
        text = self.text_slots(ids, real, features, clean, grid)
        begin = real.sum(1, keepdim=True)
        content = self.content_slots(ordered, order, groups, begin, ids.shape[1], grid)
        queries = self.query_slots(order, groups, begin, ids.shape[1], grid)
        return self.states([text, content, queries])[:, -shape[1] :]

    def text_slots(
        self,
        ids: Tensor,
        real: Tensor,
        features: Tensor | None = None,
        clean: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Slots:
        """Text and sources before the image tokens: each slot sees those before it, and padding nothing.

        Arguments as of `draw_states`.
        """
        grid = self.config.known_grid(grid)
        self.check_context(ids.shape[1] + grid[0] * grid[1])
        if ids.device.type == "cpu":
            self.check_slots(ids, features, clean)
        column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        position = (real.cumsum(1) - 1).clamp(min=0)
        embedded = self._embed(ids, features, clean, grid)
        return Slots(embedded, position, column.where(real, NEVER), column.where(real, -1))

    def content_slots(
        self, tokens: Tensor, places: Tensor, groups: Tensor, begin: Tensor, text: int, grid: Grid | None = None
    ) -> Slots:
        """Known tokens, which see the text, each other's step and the steps before.

        Args:
            tokens: [B, K, C], normalised.
            places: of the tokens, int64 [B, K].
            groups: their steps, int64 [B, K].
            begin: the text's length without padding, int64 [B, 1].
            text: T, its length with padding.
            grid: see `draw_states`.
        """
        embedded = self.token_proj(tokens.to(self.token_proj.weight.dtype)) + self.placed(places, grid)
        return Slots(embedded.to(self.dtype), begin + places, text + groups, text + groups)

    def query_slots(self, places: Tensor, groups: Tensor, begin: Tensor, text: int, grid: Grid | None = None) -> Slots:
        """Tokens to be predicted, which see the text and the steps before theirs; arguments as of `content_slots`."""
        embedded = self.query_embedding + self.placed(places, grid)
        return Slots(embedded, begin + places, torch.full_like(groups, NEVER), text + groups - 1)

    def placed(self, places: Tensor, grid: Grid | None = None) -> Tensor:
        """The embeddings [..., D] of places in raster order, int64 [...]; grid as of `draw_states`."""
        if self.config.grids is None:
            return self.place_embedding[places]
        return self.place_embedding(places, self.config.known_grid(grid))

    def states(self, parts: list[Slots]) -> Tensor:
        """The transformer's last states [B, S, D] of all slots of the parts, whose order makes no other difference."""
        embedded, position, visible, sees = map(torch.cat, zip(*parts, strict=True), [1] * len(Slots._fields))
        own = torch.arange(visible.shape[1], device=visible.device)
        return attend(self.backbone, embedded, Sight(position, sees, own, visible, position))

    def _embed(
        self, ids: Tensor, features: Tensor | None = None, clean: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """The embeddings of ids, and in the slots of pictures of what is seen of them.

        Where no picture is given, what would see it has a gradient of zeros: each process of a training needs one.
        """
        embedded = self.backbone.get_input_embeddings()(ids.clamp(min=0))
        if features is not None and self.vision_proj is not None:
            projected = self.vision_proj(features.to(self.token_proj.weight.dtype))
            embedded = _placed(embedded, ids == FEATURES, projected)
        if clean is not None and self.source_embedding is not None:
            projected = self.token_proj(clean.to(self.token_proj.weight.dtype))
            places = self.placed(torch.arange(clean.shape[1], device=clean.device), grid)
            embedded = _placed(embedded, ids == TOKENS, projected + places + self.source_embedding)
        return embedded

    def check_slots(self, ids: Tensor, features: Tensor | None = None, clean: Tensor | None = None) -> None:
        """Raise a ValueError unless there are as many features, and clean tokens, as slots for them among the ids."""
        config = self.config
        for name, given, channels, slot, missing in (
            ("features", features, config.vision_channels, FEATURES, "vision_channels, it reads no pictures"),
            (
                "clean",
                clean,
                config.token_channels if self.source_embedding is not None else None,
                TOKENS,
                "such sources",
            ),
        ):
            wanted = int((ids == slot).sum())
            if channels is None and (wanted or (given is not None and len(given))):
                raise ValueError(f"{name}: the model was made without {missing}")
            if given is not None and (given.ndim != 3 or given.shape[-1] != channels) and len(given):
                raise ValueError(f"{name}: expected shape [P, M, {channels}], got {tuple(given.shape)}")
            found = 0 if given is None else given.shape[0] * given.shape[1]
            if wanted != found:
                raise ValueError(f"{name}: expected as many as the ids have slots for, {wanted}, got {found}")

    def check_context(self, length: int) -> int:
        """How much room the transformer's context has left behind `length` tokens.

        Raises:
            ValueError: if they are more than it holds.
        """
        longest = self.backbone.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"context: the transformer has positions for {longest} tokens, got {length}")
        return longest - length

    # checkpoints

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        weights: str | None = None,
    ) -> UniFluid:
        """Read what `save_pretrained` wrote, in the dtype of the file if none is given; see `UniFlow.from_pretrained`.

        Raises:
            FileNotFoundError: if something is missing.
            NotADirectoryError: if it is a file.
            ValueError: if config.json describes no UniFluid, or the text tokenizer is another; for a dtype that weights
                cannot have.
            CheckpointError: if the weights are damaged or of another model.

        Warns:
            NotFiniteWarning: if weights are NaN or infinite.

        Nothing in the folder is executed, and nothing is downloaded but a repository that is named.
        """
        chosen = as_dtype(dtype, torch_dtype)
        folder = local_folder(folder)
        UniFluidConfig.from_pretrained(folder)  # says what is wrong with a folder before its weights are read
        state = read_state(folder, mark=cls.mark, weights=weights)
        model = cls.outlined(folder, state)
        assign_state(model, state, str(folder), chosen)
        model.backbone.tie_weights()
        return model.to(device, chosen).eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `UniFlow.load_state_dict`."""
        return super().load_state_dict(chosen_weights(state_dict, self.mark, "state_dict"), strict, assign)

    @classmethod
    def outlined(cls, folder: str | Path, state: Mapping[str, Tensor]) -> UniFluid:
        """A new model of what `save_config` wrote, if the tensors of `state` can be all it holds.

        Errors as of `from_pretrained`.
        """
        config, texts = UniFluidConfig.from_pretrained(folder), read_text_tokenizer(Path(folder) / _TEXT_TOKENIZER)
        vision = None
        if config.vision_encoder is not None:
            own = {name.removeprefix("vision."): part for name, part in state.items() if name.startswith("vision.")}
            vision = VisionFeatures.described(config.vision_encoder, config.vision_merge, own)
        outline(lambda: cls(config, texts, vision=vision), state, str(folder))
        # not on the meta device: tables of positions are in no checkpoint
        return cls(config, texts, vision=vision)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and what `save_config` writes."""
        write_state(self, folder)
        self.save_config(folder)

    def save_config(self, folder: str | Path) -> None:
        """Write config.json and the text tokenizer, in a folder of its own."""
        self.config.save_pretrained(folder)
        self.text_tokenizer.save_pretrained(str(Path(folder) / _TEXT_TOKENIZER))


def _check_own_vision(config: UniFluidConfig, vision: VisionFeatures | None) -> None:
    if (vision is None) != (config.vision_encoder is None):
        which = "no encoder" if vision is not None else "the encoder"
        raise ValueError(f"vision: expected {which}, as the config's vision_encoder says")
    if vision is not None and (vision.width, vision.merge) != (config.vision_channels, config.vision_merge):
        raise ValueError(
            f"vision: expected features of {config.vision_channels} channels, of {config.vision_merge} patches a side, "
            f"got {vision.width} and {vision.merge}"
        )


def _projection(config: UniFluidConfig, width: int) -> nn.Module | None:
    """What makes embeddings of features, if the model sees any."""
    if config.vision_channels is None:
        return None
    first = nn.Linear(config.vision_channels, width)
    return first if config.vision_layers == 1 else nn.Sequential(first, nn.GELU(), nn.Linear(width, width))


def _placed(embedded: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """Rows [P, M, D], one after the other, in those of the slots [B, T, D] that `where`, bool [B, T], marks."""
    number = (where.flatten().cumsum(0) - 1).clamp(min=0).view(where.shape)
    rows = F.pad(rows.flatten(0, 1), (0, 0, 0, 1))  # one more, for what is marked nowhere
    return torch.where(where.unsqueeze(-1), rows[number].to(embedded.dtype), embedded)


# a tied head is the text embedding under a second name, which no file needs twice


def _leave_out_what_is_tied(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if model.backbone.config.tie_word_embeddings:
        state.pop(prefix + model._head, None)


def _give_what_is_tied(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if model.backbone.config.tie_word_embeddings and prefix + model._embedding in state:
        state[prefix + model._head] = state[prefix + model._embedding]

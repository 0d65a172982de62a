"""A UniFlow's folders: how it is read from one, or from the Hub, and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn

from uniflow.checkpoint import as_dtype, assign_state, chosen_weights, outline, read_state, write_state
from uniflow.config import UniFlowConfig
from uniflow.encoder import Encoder
from uniflow.flow_decoder import FlowDecoder
from uniflow.hub import local_folder, model_card, push
from uniflow.preprocessor import check_preprocessor, write_preprocessor
from uniflow.pretrained import PretrainedEncoder, described_encoder
from uniflow_kernels.modules.fp8_linear import lower
from uniflow_kernels.ops.fp8_linear import check_precision

# what a model card counts the parameters of
_PARTS = {
    "encoder": ("embeddings.", "encoder."),
    "latents": ("chal_proj.", "chal_unproj."),
    "global blocks": ("global_block", "decoder_pos_embed"),
    "flow head": ("flow_head.",),
}


class Stored(nn.Module):
    """What a UniFlow has of methods about folders; made of a config, and perhaps an encoder."""

    config: UniFlowConfig
    encoder: nn.Module
    global_blocks: nn.ModuleList
    flow_head: FlowDecoder
    decoder_pos_embed: nn.Parameter

    mark = "chal_proj.c_fc.weight"  # the name of a parameter that each has, by which it is found in a checkpoint

    def __init__(self, config: UniFlowConfig, pretrained: PretrainedEncoder | None = None) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        precision: str | None = None,
        weights: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read a checkpoint folder, official or of a tokenizer around another encoder, in evaluation mode.

        Args:
            folder: with config.json and model.safetensors (or its shards and their index) or pytorch_model.bin; or the
                name of a repository on the Hub, OWNER/NAME or OWNER/NAME@REVISION.
            device: where the parameters go.
            dtype: of the parameters, also by its name ("bfloat16"); that of the file if not given.
            torch_dtype: the same, by the name that the transformers package had for it.
            precision: "fp8" for products in 8-bit floats, see `lower`: for inference alone, so call the model under
                torch.inference_mode().
            weights: which model of a file that holds several, as one and its average: "ema", or all of its prefix.
            revision, cache_dir, local_files_only: of a repository, see `uniflow.hub.local_folder`.

        Raises:
            FileNotFoundError: if there is no config.json or no weights, or a repository cannot be had.
            NotADirectoryError: if it is a file.
            CheckpointError: if keys are missing, unexpected or of another shape (with the first of each), the config is
                of a model that the weights cannot fill, a file is damaged, or it holds several models and `weights`
                names none.
            ImportError: if its encoder is one of the transformers package, and this is not installed; without
                huggingface_hub for a repository.
            ValueError: if the config describes no UniFlow; if preprocessor_config.json is of other images than
                ImageNet's; for a dtype that weights cannot have, or a precision that is unknown or that the device does
                not have.

        Warns:
            NotFiniteWarning: if weights are NaN or infinite.
            UserWarning: if the weights lie under a prefix or in a dictionary beside others: "module.", "state_dict".

        Nothing in the folder is executed (pytorch_model.bin is read with weights_only), and nothing is downloaded but a
        repository that is named.
        """
        chosen = as_dtype(dtype, torch_dtype)
        folder = local_folder(folder, revision, cache_dir, local_files_only)
        config = UniFlowConfig.from_pretrained(folder)
        check_preprocessor(folder)
        check_precision(precision, torch.device(device), config.head_width)
        state = read_state(folder, mark=cls.mark, weights=weights)
        model = cls.outlined(config, state, str(folder))
        assign_state(model, state, str(folder), chosen)
        if precision is not None:
            model.lower(precision)
        return model.to(device, chosen).eval()

    def lower(self, precision: str) -> Self:
        """Have the products of the layers and of the flow head's modulations in a precision from here on; the model.

        The channel projections around the latent and the flow head's other products stay in the dtype of the
        parameters, by their share of the error (docs/fp8.md), and so do linear layers whose sizes are no multiples of
        16, that have hooks or that are of another class.

        Args:
            precision: "fp8".

        Raises:
            ValueError: for another one.
        """
        check_precision(precision)
        for part in (self.encoder, self.global_blocks):
            lower(part)
        self.flow_head.net.precision = precision
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; also the state of one that was compiled or wrapped, or a checkpoint with that in it.

        Raises:
            CheckpointError: if there are several models in it.
            RuntimeError: if it does not fit.

        Warns:
            UserWarning: what was taken off the keys.
        """
        return super().load_state_dict(chosen_weights(state_dict, self.mark, "state_dict"), strict, assign)

    @classmethod
    def outlined(cls, config: UniFlowConfig, state: Mapping[str, Tensor], source: str) -> Self:
        """A model whose parameters are on the meta device, to be assigned; errors as of `uniflow.checkpoint.outline`.

        An encoder of another make is on the CPU: some of its tensors are in no checkpoint.
        """
        pretrained = None if config.encoder is None else described_encoder(config, state)
        return outline(lambda: cls(config, pretrained), state, source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json; each file is whole or not there.

        The official code reads them too. Not around an encoder of the transformers package, which is described by the
        config's `encoder`: then config.json is of another model type.

        Raises:
            ValueError: if the encoder cannot be made again from a description.
        """
        if not isinstance(self.encoder, Encoder) and self.config.encoder is None:
            raise ValueError(
                "save_pretrained: expected an encoder of the InternViT kind, or one that transformers makes from its "
                "configuration alone; keep state_dict(), and load it into a tokenizer around the same encoder"
            )
        write_state(self, folder)
        write_preprocessor(folder, self.config.image_size)
        self.save_config(folder)

    def push_to_hub(
        self,
        repository: str,
        *,
        licence: str | None = None,
        scores: Mapping[str, float] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, and a model card, to the Hub.

        Args:
            repository: OWNER/NAME; made if it is not there.
            licence, scores: for the card, see `uniflow.hub.model_card`.
            private: whether a repository that is made is.
            revision: the branch to write to.
            message: of the commit.
            token: of the account, if huggingface_hub does not know it.

        Returns:
            The address of the commit.

        Raises:
            ImportError: if huggingface_hub is not installed.
            ValueError: as `save_pretrained`; if the name is not OWNER/NAME.
        """
        sizes = {
            name: sum(parameter.numel() for own, parameter in self.named_parameters() if own.startswith(starts))
            for name, starts in _PARTS.items()
        }
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            card = model_card(repository, self.config.to_dict(), sizes, licence, scores)
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return push(Path(folder), repository, private, revision, message, token)

    def save_config(self, folder: str | Path) -> None:
        """Write config.json alone."""
        self.config.extra["torch_dtype"] = str(self.decoder_pos_embed.dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)

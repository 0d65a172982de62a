"""Models of the transformers package, made of configurations that were checked and of tensors that were read here.

The package is never shown a folder with weights: it would run what `auto_map` names after a "y" on stdin, ask the hub
for the backbone that a configuration names, and give tensors that a file lacks random numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from uniflow.checkpoint import CheckpointError, outline
from uniflow.config import LARGEST_DEPTH
from uniflow.reading import shown

_LONGEST_REASON = 300
_LARGEST_INTEGER = (1 << 31) - 1
_COUNT = re.compile(r"(layers?|depths?|blocks)(_per_\w+)?$")  # num_hidden_layers, n_layer, depth, layers_per_block ...
_DTYPES = ("float32", "bfloat16", "float16", "float64")

# what says nothing about the model: how it is run (a name there may be that of code on the hub), where it came from,
# and the classes of a classifier. So do names that begin with an underscore
_LEFT_OUT = (
    "auto_map",
    "attn_implementation",
    "experts_implementation",
    "name_or_path",
    "transformers_version",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
)
# what would have the package load, or replace modules by, something else
_REFUSED = ("quantization_config", "fusion_config", "kernel_config", "distributed_config", "configuration_files")


def transformers_package() -> Any:
    """The transformers package, imported when it is needed.

    Raises:
        ImportError: if it is not installed, naming the extra.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError("this needs the transformers package: pip install 'uniflow-kernels[hf]'") from None
    return transformers


def is_language_model(_: str, kind: Any) -> bool:
    """Whether the package has a decoder for configurations of a class, of which others are no part."""
    return kind in transformers_package().MODEL_FOR_CAUSAL_LM_MAPPING and not kind.sub_configs


def checked_values(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A configuration of another project without what says nothing about the model.

    Args:
        values: plain ones, as `uniflow.reading` gives them.
        source: what errors call it.

    Raises:
        ValueError: naming what is too large, or would take parts of the model from elsewhere.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in _LEFT_OUT or name.startswith("_"):
            continue
        if value is not None and (name in _REFUSED or ("backbone" in name and value is not False)):
            raise ValueError(f"{source}: {shown(name)} is not supported: it would take parts from elsewhere")
        if name in ("dtype", "torch_dtype") and value is not None and value not in _DTYPES:
            raise ValueError(f"{source}: {name}: expected one of {', '.join(_DTYPES)}, got {shown(value)}")
        kept[name] = _checked(name, value, source)
    return kept


def _checked(name: str, value: Any, source: str) -> Any:
    if isinstance(value, dict):
        return checked_values(value, source)
    if isinstance(value, list):
        return [_checked(name, part, source) for part in value]
    most = LARGEST_DEPTH if _COUNT.search(name) else _LARGEST_INTEGER
    if isinstance(value, int) and abs(value) > most:
        raise ValueError(f"{source}: {shown(name)}: expected at most {most}, got {value}")
    return value


def configuration(values: Mapping[str, Any], source: str, supported: Callable[[str, Any], bool]) -> Any:
    """The transformers package's configuration for the contents of a config.json.

    Args:
        values: its contents.
        source: what errors call it.
        supported: whether a model type, and the class of its configurations, can be used.

    Raises:
        ImportError: if the transformers package is not installed.
        ValueError: if the kind is unknown or not supported, or for values that no such configuration can have.
    """
    transformers = transformers_package()
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{source}: transformers {transformers.__version__} has no model of the kind {shown(kind)}")
    own = transformers.CONFIG_MAPPING[kind]
    if not supported(kind, own):
        raise ValueError(f"{source}: a model of the kind {kind!r} cannot be used here")
    kept = checked_values(values, source)
    for name in kept:
        if callable(getattr(own, name, None)):  # what is no field would become an attribute, in a method's place
            raise ValueError(f"{source}: transformers has no field {name} in a configuration of the kind {kind!r}")
    # by way of a file: where the package reads one, it brings what older versions wrote up to date
    with TemporaryDirectory() as folder, quiet(transformers):
        (Path(folder) / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the package raises whatever its configurations do
            raise ValueError(f"{source}: transformers makes no {kind} of its config: {short_reason(error)}") from None
    config.name_or_path = ""
    return config


def new_model(auto: Any, config: Any, source: str, state: Mapping[str, Tensor] | None = None, **options: Any) -> Any:
    """A new model.

    Args:
        auto: AutoModel, or another class of the transformers package that chooses one by a configuration.
        config: see `configuration`.
        source: what errors call it.
        state: weights that it shall hold: a model that is much larger is refused before it is made.
        options: for `auto.from_config`.

    Raises:
        CheckpointError: if the weights cannot be those of such a model.
        ValueError: if the package makes none of the configuration.
    """

    def build() -> nn.Module:
        return auto.from_config(config, trust_remote_code=False, **options)

    with _explained(config, source):
        if state is not None:
            outline(build, state, source)
        return build()


def loaded_model(
    auto: Any, config: Any, state: Mapping[str, Tensor], source: str, **options: Any
) -> tuple[Any, dict[str, list[str]]]:
    """A model with its weights, on the CPU, in evaluation mode and in the dtype that the configuration or they have.

    Args:
        auto: as for `new_model`.
        config: see `configuration`.
        state: the weights, by the names of any version of the package.
        source: what errors call it.
        options: for `from_pretrained` of the model's class.

    Returns:
        The model, and keys that are "missing", "unexpected" or "of another shape": the first and last got random
        numbers, so that whoever needs them has to refuse the model.

    Raises:
        CheckpointError: if the weights cannot be those of such a model.
        ValueError: if the package makes none of the configuration.
    """
    transformers = transformers_package()
    with _explained(config, source), quiet(transformers):
        sketch = outline(lambda: auto.from_config(config, trust_remote_code=False, **options), state, source)
        model, info = type(sketch).from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in what it returns
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    shapes = [f"{name} ({list(found)}, expected {list(own)})" for name, found, own in sorted(info["mismatched_keys"])]
    return model, {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": shapes,
    }


@contextmanager
def _explained(config: Any, source: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the package raises whatever its models do
        raise ValueError(
            f"{source}: transformers makes no {config.model_type} of its config: {short_reason(error)}"
        ) from None


def short_reason(error: Exception) -> str:
    """What an exception of another package says, in one line that is not too long."""
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the bars and tables of the transformers package, which say at length what an error says in a line."""
    logging = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

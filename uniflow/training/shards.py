"""The shards of a checkpoint, read without executing anything: torch's reader unpickles its metadata as it comes."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from uniflow.checkpoint import CheckpointError
from uniflow.reading import check_file, shown

METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath"),
}
_OF_TORCH = ("Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


class ShardReader(FileSystemReader):
    """Reads a folder of shards; a CheckpointError if its metadata hold anything but tensors' sizes and places."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the shards hold, where."""
        path = Path(self.path) / METADATA
        try:
            check_file(path)
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            places = {str(place.relative_path) for place in metadata.storage_data.values()}
        except Exception as error:  # whatever a forged pickle does to the unpickler
            if isinstance(error, CheckpointError):
                raise CheckpointError(f"{path} is damaged or holds more than sizes: {error}") from None
            raise CheckpointError(f"{path} is damaged: {error!r:.200}") from None
        for place in places:
            if Path(place).name != place:
                raise CheckpointError(f"{path} names a file outside the folder: {shown(place)}")
            check_file(path.parent / place)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class ShardPlanner(DefaultLoadPlanner):
    """Loads what is no tensor (settings of an optimizer) as `torch.load` does with weights_only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Hand over what can be loaded so, written anew: torch's own planner executes what it is given."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def sharded_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of shards by name ("model.embeddings..."), on the meta device.

    Raises:
        CheckpointError: if the metadata are damaged, or of more than the files can hold.
    """
    metadata = ShardReader(folder).read_metadata()
    try:
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except Exception as error:
        raise CheckpointError(f"{folder / METADATA} is damaged: {error!r:.200}") from None
    held = sum(path.stat().st_size for path in folder.iterdir())
    if sum(tensor.nbytes for tensor in tensors.values()) > held:
        raise CheckpointError(f"{folder} is damaged: {METADATA} names more numbers than its {held} bytes can hold")
    return tensors


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()) or (module == "torch" and name in _OF_TORCH):
            return super().find_class(module, name)
        raise CheckpointError(f"it asks for {shown(f'{module}.{name}')}, and none of it was executed")

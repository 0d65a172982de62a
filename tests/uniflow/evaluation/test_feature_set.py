import os
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from uniflow import EncoderTeacher
from uniflow.evaluation import feature_set
from uniflow.evaluation.feature_set import FeatureSet, feature_key
from uniflow.evaluation.probing import PooledLayers


def test_the_key_is_of_all_that_features_depend_on(tiny, tmp_path):
    """The last bit of a weight, a buffer that no file holds, the file of a picture, ...; and of nothing else."""
    encoder = EncoderTeacher.copy_of(tiny())
    encoder.embeddings.register_buffer("scale", torch.ones(1), persistent=False)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"1234")
    os.utime(picture, ns=(0, 10**18))

    def key(pooled=None, config=None, size=16, name="a.png", **more):
        pooled = PooledLayers(encoder, [1]) if pooled is None else pooled
        return feature_key(pooled, config or {"heads": 2}, size, [(name, picture)], **more)

    first = key()
    assert key(PooledLayers(deepcopy(encoder), [1])) == first
    weight, buffer = deepcopy(encoder), deepcopy(encoder)
    weight.encoder.layers[-1].ls1.view(torch.int32)[0] += 1
    buffer.embeddings.scale += 1
    others = [
        key(PooledLayers(weight, [1])),
        key(PooledLayers(buffer, [1])),
        key(PooledLayers(encoder.lowered(torch.bfloat16), [1])),
        key(PooledLayers(encoder, [2])),
        key(PooledLayers(encoder, [1], "class")),
        key(config={"heads": 4}),
        key(size=32),
        key(name="b.png"),
        key(largest=5),
    ]
    os.utime(picture, ns=(0, 10**18 + 1))
    others.append(key())
    picture.write_bytes(b"123")
    os.utime(picture, ns=(0, 10**18))
    others.append(key())
    assert len({first, *others}) == 1 + len(others)


def test_parts_are_written_in_any_order_and_read_in_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_set, "PER_PART", 3)
    kept = FeatureSet(tmp_path / "key", (2, 5), 7)
    features = torch.randn(2, 7, 4)
    kept.write(2, [6], features[:, 6:])
    assert kept.missing() == [0, 1]
    with pytest.raises(ValueError, match=r"is not finished: features-00000\.safetensors is missing"):
        kept.numbers()
    kept.write(0, [0, 2], features[:, [0, 2]])  # the second picture cannot be read
    kept.write(1, [], features[:, :0])  # and none of these
    assert kept.missing() == []
    assert kept.numbers().tolist() == [0, 2, 6]
    assert np.array_equal(kept.features(5), features[1, [0, 2, 6]].numpy())
    assert len(list(kept.folder.iterdir())) == 3  # nothing else is left


def test_what_is_not_finite_or_damaged(tmp_path):
    kept = FeatureSet(tmp_path, (1,), 2)
    with pytest.raises(ValueError, match="the features are not finite"):
        kept.write(0, [0, 1], torch.tensor([[[1.0], [float("nan")]]]))
    assert not list(tmp_path.iterdir())
    kept.write(0, [0, 1], torch.ones(1, 2, 3))
    path = tmp_path / "features-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"features-00000\.safetensors is damaged: delete it, and it is made again"):
        kept.features(1)


@pytest.mark.parametrize(
    "tensors",
    [
        {"pictures": torch.tensor([0, 2]), "layer.1": torch.ones(2, 3)},  # there are two pictures
        {"pictures": torch.tensor([1, 0]), "layer.1": torch.ones(2, 3)},
        {"pictures": torch.tensor([-1, 0]), "layer.1": torch.ones(2, 3)},
        {"pictures": torch.tensor([0.0, 1.0]), "layer.1": torch.ones(2, 3)},
        {"pictures": torch.tensor([0, 1]), "layer.1": torch.ones(3, 3)},
        {"pictures": torch.tensor([0, 1]), "layer.1": torch.ones(2)},
        {"pictures": torch.tensor([0, 1]), "layer.1": torch.ones(2, 3, dtype=torch.float64)},
        {"pictures": torch.tensor([0, 1]), "layer.2": torch.ones(2, 3)},
    ],
)
def test_a_part_that_someone_else_wrote(tmp_path, tensors):
    save_file(tensors, tmp_path / "features-00000.safetensors")
    with pytest.raises(ValueError, match=r"features-00000\.safetensors is damaged: delete it"):
        FeatureSet(tmp_path, (1,), 2).features(1)

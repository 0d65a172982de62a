"""Networks from files: TorchScript, torch.export, weights of torch-fidelity's Inception; and what is none."""

import pytest
import torch
from torch import nn

from tests.uniflow.evaluation.conftest import Apart, Colours, Embedded, Pair
from uniflow.evaluation import FeatureNetwork, PerceptualDistance

CPU = torch.device("cpu")


def pictures(count=3, seed=0):
    return torch.randint(0, 256, (count, 3, 8, 10), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def script(path, module):
    torch.jit.script(module).save(path)
    return path


def test_a_detector_as_stylegan_has_them(colours):
    network = FeatureNetwork(colours, CPU)
    expected = Colours()(pictures(), return_features=True)
    assert torch.equal(network(pictures()), expected)
    features, likely = network.with_probabilities(pictures())
    assert torch.equal(features, expected)
    assert torch.equal(likely, Colours()(pictures(), no_output_bias=True))


def test_a_pair_of_features_and_probabilities(tmp_path):
    network = FeatureNetwork(script(tmp_path / "pair.pt", Pair()), CPU)
    features, likely = Pair()(pictures())
    assert torch.equal(network(pictures()), features)
    assert all(map(torch.equal, network.with_probabilities(pictures()), (features, likely)))


def test_an_exported_program(tmp_path):
    many = {"pictures": {0: torch.export.Dim("batch", min=1, max=99)}}
    exported = torch.export.export(Pair().eval(), (pictures(),), dynamic_shapes=many)
    torch.export.save(exported, tmp_path / "pair.pt2")
    network = FeatureNetwork(tmp_path / "pair.pt2", CPU)
    assert torch.equal(network(pictures(5)), Pair()(pictures(5))[0])


def test_features_do_not_depend_on_autocast(tmp_path):
    """A validation runs under the training's."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, pictures):
            return pictures.float().mean((2, 3)) @ self.weight

    network = FeatureNetwork(script(tmp_path / "product.pt", Product()), CPU)
    alone = network(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(pictures()), alone)


def test_weights_of_the_inception_network(tmp_path):
    """Random ones: the true ones are not to be had here."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    torch.manual_seed(0)
    torch.save({}, tmp_path / "none.pth")
    torch.save(Untrained("fid", ["2048"], str(tmp_path / "none.pth")).state_dict(), tmp_path / "inception.pth")
    network = FeatureNetwork(tmp_path / "inception.pth", CPU)
    theirs = inception.FeatureExtractorInceptionV3("fid", ["2048", "logits_unbiased"], str(tmp_path / "inception.pth"))
    with torch.no_grad():
        expected, logits = theirs(pictures())
    features, likely = network.with_probabilities(pictures())
    assert features.shape == (3, 2048)
    assert torch.equal(features, expected)
    assert torch.equal(likely, logits.softmax(1))


class Listed(nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float()


class Broken(nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean((2, 3)) @ torch.zeros(4, 4)


class Endless(nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean((2, 3)) / 0 - 1


class Unlikely(nn.Module):
    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pictures.float().mean((2, 3)), pictures.float().mean((2, 3))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Listed(), r"expected features \[3, D\] of the network, got \[3, 3, 8, 10\]"),
        (Broken(), r"the network fails on pictures \[3, 3, 8, 10\]"),
        (Endless(), "features: expected finite numbers"),
        (Unlikely(), "expected probabilities of classes"),
    ],
)
def test_what_a_network_must_not_give(tmp_path, module, message):
    network = FeatureNetwork(script(tmp_path / "bad.pt", module), CPU)
    with pytest.raises(ValueError, match=message):
        network.with_probabilities(pictures())


def test_files_that_hold_no_network(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    (tmp_path / "text.pt2").write_text("no")
    with pytest.raises(ValueError, match=r"state\.pt: expected a program of TorchScript"):
        FeatureNetwork(tmp_path / "state.pt", CPU)
    with pytest.raises(ValueError, match=r"text\.pt2: expected a program of torch\.export"):
        FeatureNetwork(tmp_path / "text.pt2", CPU)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        PerceptualDistance(tmp_path / "none.pt", CPU)


def test_perceptual_distances(tmp_path):
    one, other = pictures(), pictures(seed=1)
    expected = ((one.float() - other.float()) / 127.5).square().mean((1, 2, 3))
    for module in (Apart(), Embedded()):
        distance = PerceptualDistance(script(tmp_path / "distance.pt", module), CPU)
        assert torch.allclose(distance(one, other), expected, rtol=1e-5)
        assert distance(one, one).tolist() == [0, 0, 0]


def test_what_is_no_distance(tmp_path):
    class Both(nn.Module):
        def forward(self, one, other):
            return one.mean((2, 3)) + other.mean((2, 3))

    distance = PerceptualDistance(script(tmp_path / "both.pt", Both()), CPU)
    with pytest.raises(ValueError, match=r"expected distances \[3\] of the network, got \[3, 3\]"):
        distance(pictures(), pictures())

"""Mean, covariance and Fréchet distance of features, and the file they are kept in."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance

from uniflow.evaluation import FeatureStatistics, frechet_distance


def statistics(features, batch=7):
    made = FeatureStatistics(features.shape[1])
    for part in features.split(batch):
        made.add(part)
    return made


def two_sets(count=200, width=24):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(width, width, generator=generator)
    one, other = torch.randn(2, count, width, generator=generator)
    return (one @ mixed).relu(), (other @ mixed + 0.3).relu()


def test_as_torchmetrics_on_the_same_features():
    class Given(torch.nn.Module):
        num_features = 24

        def forward(self, pictures):
            return (one if pictures.shape[2] == 1 else other)[: len(pictures)]

    one, other = two_sets()
    theirs = FrechetInceptionDistance(Given(), input_img_size=(3, 1, 1))
    theirs.update(torch.zeros(200, 3, 1, 1, dtype=torch.uint8), real=True)
    theirs.update(torch.zeros(200, 3, 2, 2, dtype=torch.uint8), real=False)
    ours = frechet_distance(statistics(one), statistics(other))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert ours == pytest.approx(frechet_distance(statistics(other), statistics(one)), rel=1e-9)


def test_by_hand():
    """Independent features: the distance is that of each by itself, (m1 - m2)² + (s1 - s2)²."""
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    other = one * torch.tensor([3.0, 0.5]) + torch.tensor([2.0, 0.0])
    deviation = (4 / 3) ** 0.5
    expected = 2.0**2 + (deviation * 2) ** 2 + (deviation * 0.5) ** 2
    assert frechet_distance(statistics(one), statistics(other)) == pytest.approx(expected, rel=1e-12)


def test_fewer_pictures_than_features():
    """Where the covariances are singular; torch's own eigenvalues of their product are off by 1e-8."""
    one, other = two_sets(count=5, width=24)
    one, other = one.double(), other.double()
    centred = [features - features.mean(0) for features in (one, other)]
    # the trace of the root is the sum of the singular values of the features' own product
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / 4
    spread = sum(features.square().sum() / 4 for features in centred)
    expected = (one.mean(0) - other.mean(0)).square().sum() + spread - 2 * shared
    assert frechet_distance(statistics(one), statistics(other)) == pytest.approx(expected.item(), rel=1e-10)
    assert abs(frechet_distance(statistics(one), statistics(one))) < 1e-10


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0, 1e6))
def test_batches_of_any_size(sizes, offset):
    """A large mean takes nothing from the covariance, as it would from a difference of sums."""
    features = torch.randn(sum(sizes) + 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + offset
    made = FeatureStatistics(3)
    for part in features.split([2, *sizes]):
        made.add(part)
    assert made.count == len(features)
    assert torch.allclose(made.mean, features.mean(0), rtol=1e-12)
    assert torch.allclose(made.covariance, features.T.cov(), rtol=1e-6, atol=1e-9)


def test_a_file_and_back(tmp_path):
    one, other = map(statistics, two_sets())
    one.save(tmp_path / "one.npz", "abc")
    assert FeatureStatistics.load(tmp_path / "one.npz").count == 200
    again = FeatureStatistics.load(tmp_path / "one.npz", "abc")
    assert frechet_distance(again, other) == pytest.approx(frechet_distance(one, other), rel=1e-12)
    again.add(two_sets()[1])
    assert torch.allclose(again.mean, torch.cat(two_sets()).double().mean(0))
    with pytest.raises(ValueError, match=r"another network than the one given \(SHA-256 abc\)"):
        FeatureStatistics.load(tmp_path / "one.npz", "abd")


def test_features_are_kept_beside(tmp_path):
    """Of some pictures; whoever does not ask for them is not kept waiting by what may be 400 MB."""
    kept = statistics(two_sets()[0])
    kept.features = two_sets()[0][:5].float()
    kept.save(tmp_path / "kept.npz")
    assert FeatureStatistics.load(tmp_path / "kept.npz").features is None
    again = FeatureStatistics.load(tmp_path / "kept.npz", with_features=True)
    assert torch.equal(again.features, kept.features)


def test_the_file_of_others(tmp_path):
    """As pytorch-fid, clean-fid and ADM write them: mu and sigma, and what else they like."""
    one, other = map(statistics, two_sets())
    path = tmp_path / "theirs.npz"
    np.savez(path, mu=one.mean.numpy(), sigma=one.covariance.numpy(), mu_s=np.zeros(3), arr_0=np.zeros(2, np.uint8))
    again = FeatureStatistics.load(path, "abc")
    assert frechet_distance(again, other) == pytest.approx(frechet_distance(one, other), rel=1e-12)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "expected mu [D] and sigma [D, D], got [3] and [0]"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "got [3] and [2, 2]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "expected finite numbers"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "expected numbers"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "expected an .npz file with mu and sigma"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "count": np.zeros(3)}, "count: expected"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros(2)}, "features: expected finite numbers [n, 2]"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "features": np.full((9, 2), np.inf)}, "features: expected finite"),
    ],
)
def test_files_that_are_none(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        FeatureStatistics.load(tmp_path / "bad.npz", with_features=True)


def test_files_that_are_no_npz(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.save(tmp_path / "array.npy", np.zeros(2))
    for name in ("text.npz", "array.npy"):
        with pytest.raises(ValueError, match=f"{name}: expected an .npz file with mu and sigma"):
            FeatureStatistics.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        FeatureStatistics.load(tmp_path / "none.npz")


def test_features_that_are_none():
    made = FeatureStatistics(3)
    for features, message in (
        (torch.zeros(2, 4), r"expected shape \[B, 3\], got \[2, 4\]"),
        (torch.full((1, 3), torch.inf), "expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            made.add(features)
    made.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        frechet_distance(made, made)
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        frechet_distance(made, FeatureStatistics(2))

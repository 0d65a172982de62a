import pytest
import torch

from uniflow.flow import sample_t


def test_t_distributions():
    generator = torch.Generator().manual_seed(0)
    uniform = sample_t((100_000,), "uniform", generator=generator)
    lognormal = sample_t((100_000,), "lognormal", generator=generator)
    fat = sample_t((100_000,), "fat_lognormal", generator=generator)
    for t in (uniform, lognormal, fat):
        assert t.dtype == torch.float32
        assert 0 <= t.min() < t.max() <= 1
        assert abs(t.mean() - 0.5) < 0.005
    # P(t < 0.05): 0.05 if uniform, P(N(0,1) < logit 0.05) = 0.00162 if lognormal
    share = [(t < 0.05).float().mean().item() for t in (uniform, lognormal, fat)]
    assert abs(share[0] - 0.05) < 0.003
    assert abs(share[1] - 0.00162) < 0.001
    assert abs(share[2] - (0.9 * 0.00162 + 0.1 * 0.05)) < 0.001


def test_t_is_reproducible_and_shaped():
    one, two = (sample_t((3, 5), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == (3, 5)
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="t_distribution: expected one of fat_lognormal, lognormal, uniform"):
        sample_t((1,), "normal")

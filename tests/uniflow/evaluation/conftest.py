"""Small networks that judge pictures, as files."""

import pytest
import torch
from torch import Tensor, nn


class Colours(nn.Module):
    """Twelve features: the means of a picture's quarters, as StyleGAN's detectors take and give them."""

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(img.float(), 2).flatten(1) / 64
        if return_features:
            return features
        return (features[:, :5] * (1.0 if no_output_bias else 2.0)).softmax(1)


class Pair(nn.Module):
    """Features and probabilities in one call."""

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1) / 64
        return features, features[:, :5].softmax(1)


class Apart(nn.Module):
    """Distances in the shape that the lpips package gives them."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).square().mean((1, 2, 3), keepdim=True)


class Embedded(nn.Module):
    """As StyleGAN's vgg16.pt."""

    def forward(self, img: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        values = img.flatten(1) / 127.5 / float(img[0].numel()) ** 0.5
        return values if return_lpips and not resize_images else values * 0


@pytest.fixture
def colours(tmp_path):
    path = tmp_path / "colours.pt"
    torch.jit.script(Colours()).save(path)
    return path

"""A tiny tokenizer, a set of its latents on disk, and generators of their kind."""

import numpy as np
import pytest
import torch

from tests.conftest import randomize
from uniflow import UniFlow, UniFlowConfig
from uniflow.generation import FlowTransformer, FlowTransformerConfig
from uniflow.latent_set import Manifest, finish, write_shard

TOKENIZER = {"image_size": 8, "patch_size": 2, "hidden_size": 32, "vit_hidden_size": 32, "intermediate_size": 32}
TOKENIZER |= {"num_hidden_layers": 1, "num_attention_heads": 2, "latent_ch": 6}
TOKENIZER |= {"global_blocks_depth": 1, "num_decoder_layers": 1}


def tiny(**changes):
    """A generator of latents [16, 6] of three classes whose parameters are all random."""
    values = {"classes": 3, "width": 16, "depth": 2, "heads": 2, "head_width": 24, "head_depth": 1} | changes
    return randomize(FlowTransformer(FlowTransformerConfig(6, (4, 4), **values))).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return randomize(UniFlow(UniFlowConfig.preset("base", **TOKENIZER))).eval()


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def write_set(folder, tokenizer, labels=True, classes=("ant", "bee", "cat"), flips=True, count=12):
    """Two shards of latents that are far from standard: class k is around k, its mirror images around -k."""
    rng = np.random.default_rng(0)
    kinds = np.arange(count) % 3
    names = [f"{number}.png" for number in range(count)]
    known = list(classes) if labels else None
    manifest = Manifest.of(tokenizer, (8, 8), torch.float32, flips, 8, names, kinds if labels else None, known)
    manifest.write(folder)
    spread = torch.tensor([0.5, 1, 2, 4, 8, 16])
    for shard in range(manifest.shards):
        numbers = manifest.numbers(shard)
        own = torch.from_numpy(kinds[list(numbers)])
        noise = torch.from_numpy(rng.standard_normal((2, len(own), 16, 6), np.float32))
        straight, flipped = (own.view(-1, 1, 1) * torch.tensor([1, -1]).view(2, 1, 1, 1) + 0.1 * noise) * spread
        write_shard(
            folder,
            manifest,
            shard,
            straight,
            flipped if flips else None,
            own if labels else None,
            [names[number] for number in numbers],
            [],
        )
    finish(folder, manifest)
    return folder


@pytest.fixture(scope="session")
def latents(tokenizer, tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "latents", tokenizer)

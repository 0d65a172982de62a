"""Folders with something wrong in them, by chance: each is read or refused in a line; nothing runs, nothing is asked.

`make fuzz` tries a thousand and more. The readers are those of the commands: what they raise, the command says in one
line with status 2.
"""

import functools
import io
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.conftest import smooth_picture
from tests.uniflow.unifluid.conftest import LLAMA
from tests.uniflow.unifluid.test_tokens import autoencoder
from uniflow import EncoderTeacher, UniFlow, UniFlowConfig
from uniflow.cli.train import _untrained
from uniflow.cli.unifluid_questions import scores
from uniflow.generation import FlowTransformer, FlowTransformerConfig
from uniflow.latent_set import ChannelStatistics, LatentSet, Manifest, finish, write_shard
from uniflow.latents import EncodedPicture, fingerprint, meaning, read_latents, write_latents
from uniflow.training.checkpoints import MANIFEST, check, read_json, read_tensors, write_json, write_tensors
from uniflow.training.recipe import read_run
from uniflow.training.state import gather
from uniflow.unifluid.backbone import read_backbone
from uniflow.unifluid.captions import CaptionFolder
from uniflow.unifluid.config import UniFluidConfig
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.questions import read_questions
from uniflow.unifluid.recipe import UniFluidRun
from uniflow.unifluid.texts import make_text_tokenizer, read_text_tokenizer
from uniflow.unifluid.tokens import read_image_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**SMALL, "patch_size": 4, "image_size": 16}
DECODER = {"latent_ch": 8, "global_blocks_depth": 1, "num_decoder_layers": 1}
EVIL = 'open({marker!r}, "w")\nclass Evil:\n    pass\n'

pytestmark = pytest.mark.filterwarnings("ignore")


def encoded(model):
    images = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    return model.encode(images.to(model.dtype)) if images.numel() < 10**6 else None


def read_checkpoint(folder):
    check(folder)
    return read_json(folder / "progress.json"), read_tensors(folder / "optimizer.pt")


@functools.cache
def of_latents():
    return UniFlow(UniFlowConfig.preset("tiny"))


# how the commands read a folder of each kind
READERS = {
    "uniflow": lambda folder: encoded(UniFlow.from_pretrained(folder)),
    "described": lambda folder: encoded(UniFlow.from_pretrained(folder)),
    "internvit": lambda folder: encoded(UniFlow.from_encoder(folder, **DECODER)),
    "vit": EncoderTeacher.from_pretrained,
    "siglip": lambda folder: encoded(UniFlow.from_encoder(folder, **DECODER)),
    "llama": read_backbone,
    "texts": read_text_tokenizer,
    "unifluid": UniFluid.from_pretrained,
    "autoencoder": read_image_tokenizer,
    "shards": lambda folder: gather(folder, False, lambda place: _untrained(False, place)),
    "run": read_checkpoint,
    "latents": lambda folder: read_latents(folder / "latents.safetensors", of_latents()),
    "latent set": lambda folder: (
        ChannelStatistics.read(folder),
        LatentSet(folder).latent(0),
        LatentSet(folder).names(),
    ),
    "generator": lambda folder: FlowTransformer.from_pretrained(folder).check_tokenizer(of_latents()),
    "captions": lambda folder: list(map(CaptionFolder(folder).texts, range(2))),
    "questions": lambda folder: scores(read_questions(folder / "questions.jsonl")),
    "recipe": lambda folder: read_run(folder / "run.yaml", UniFluidRun),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, golden_folder):
    """A small folder of each kind, as it should be."""
    place = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    shutil.copytree(golden_folder, place / "uniflow", ignore=shutil.ignore_patterns("expected*"))
    vit = transformers.ViTModel(transformers.ViTConfig(**VISION))
    vit.save_pretrained(place / "vit")
    (place / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    UniFlow.from_encoder(vit, **DECODER).save_pretrained(place / "described")
    config = UniFlowConfig.preset("tiny", image_size=16, hidden_size=32, vit_hidden_size=32, intermediate_size=64)
    model = UniFlow(config)
    model.save_pretrained(place / "internvit")
    values = json.loads((place / "internvit" / "config.json").read_text()) | {"model_type": "intern_vit_6b"}
    (place / "internvit" / "config.json").write_text(json.dumps({"vision_config": values}))
    text = {**SMALL, "vocab_size": 99, "max_position_embeddings": 16}
    siglip = transformers.SiglipConfig(text_config=text, vision_config=VISION | {"image_size": 18})
    transformers.SiglipModel(siglip).save_pretrained(place / "siglip")
    texts = make_text_tokenizer(["a seven"], 300)
    texts.save_pretrained(place / "texts")
    vision = VisionFeatures(transformers.ViTModel(transformers.ViTConfig(**VISION)))
    seen = {"vision_channels": vision.width, "vision_encoder": vision.fields}
    unifluid = UniFluid(UniFluidConfig(LLAMA, 5, (3, 4), 32, 2, **seen), texts, vision=vision)
    unifluid.save_pretrained(place / "unifluid")
    unifluid.backbone.save_pretrained(place / "llama")
    texts.save_pretrained(place / "llama")
    autoencoder().save_pretrained(place / "autoencoder")
    model.save_config(place / "shards")
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"model": model.state_dict()}, checkpoint_id=place / "shards" / "shards", no_dist=True)
    (place / "run").mkdir()
    write_json(place / "run" / "progress.json", {"step": 1, "samples": 2})
    write_tensors(place / "run" / "optimizer.pt", {"state": {"a": {"step": torch.zeros(())}}, "groups": [1.0, True]})
    for name in ("run", "shards"):
        seal(place / name)
    for name in ("latents", "captions", "questions", "recipe"):
        (place / name).mkdir()
    picture = EncodedPicture("a.png", 16, 16)
    write_latents(place / "latents" / "latents.safetensors", [torch.zeros(16, 16)], [picture], of_latents())
    (place / "latent set").mkdir()
    manifest = Manifest.of(of_latents(), (16, 16), torch.float32, False, 2, ["a", "b"], None, None)
    manifest.write(place / "latent set")
    write_shard(place / "latent set", manifest, 0, torch.zeros(2, 16, 16), None, None, ["a", "b"], [])
    finish(place / "latent set", manifest)
    known = {"names": ["a", "b"], "tokenizer": meaning(of_latents()), "fingerprint": fingerprint(of_latents())}
    of_kind = FlowTransformerConfig(16, (4, 4), 2, 16, 1, 2, head_width=16, head_depth=1, **known)
    FlowTransformer(of_kind).save_pretrained(place / "generator")
    smooth_picture((8, 8), 0).save(place / "captions" / "a.png")
    (place / "captions" / "captions.jsonl").write_text('{"image": "a.png", "caption": "a seven"}\n' * 2)
    shutil.copy(place / "captions" / "a.png", place / "questions")
    about = {"image": "a.png", "question": "which?", "answer": "7", "response": "7"}
    choice = {**about, "choices": ["7", "9"], "likelihoods": [-1.0, -2.5]}
    (place / "questions" / "questions.jsonl").write_text(f"{json.dumps(about)}\n{json.dumps(choice)}\n")
    shutil.copy(Path(__file__).parents[2] / "examples" / "unifluid.yaml", place / "recipe" / "run.yaml")
    for name, read in READERS.items():
        read(place / name)
    return place


def seal(folder):
    """A manifest that fits, as whoever forges a folder writes it."""
    from uniflow.training.checkpoints import _digest

    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    write_json(folder / MANIFEST, {str(path.relative_to(folder)): _digest(path) for path in files})


class Command:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


# --- what may be wrong ---

KINDS = ("detr", "dpt", "timm_wrapper", "mask2former", "mamba", "gpt2", "bert", "xlm", "clip", "gemma3", "uniflux")
KEYS = (
    "auto_map",
    "backbone",
    "use_pretrained_backbone",
    "backbone_config",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "fusion_config",
    "transformers_weights",
    "configuration_files",
    "dtype",
    "tokenizer_class",
    "to_dict",
    "vision_config",
    "layer_types",
    "num_hidden_layers",
    "rope_parameters",
)
AUTO_MAP = dict.fromkeys(
    ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoBackbone"), "evil.Evil"
)
deep = json.loads("[" * 60 + "]" * 60)
values = st.one_of(
    st.sampled_from([None, True, "", "x\x1b[31m", "org/kernel", "resnet50", "evil.Evil", [], {}, [1], [[{}]], deep]),
    st.sampled_from([-1, 0, 1, 3, 64, 1024, 2**31, 10**9, 10**12, 2**70, 0.0, -1.5, 1e-30, 1e30, 1e308]),
    st.sampled_from([float("nan"), float("inf"), AUTO_MAP, ["evil.Evil", "evil.Evil"], {"model_type": "detr"}, *KINDS]),
    st.text(max_size=8),
)


def paths(value, own=()):
    """Of all values within a value of JSON."""
    yield own
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from paths(part, (*own, key))


def change_json(data, text):
    try:
        value = json.loads(text)
    except ValueError:
        return text
    path = data.draw(st.sampled_from(list(paths(value))[:200]))
    place = value
    for key in path[:-1]:
        place = place[key]
    how = data.draw(st.sampled_from(["set", "set", "delete", "add", "kind"]))
    if how == "add" or not path:
        place = value
        for key in path:
            place = place[key]
        target = place if isinstance(place, dict) else value
        if isinstance(target, dict):
            key = data.draw(st.sampled_from(KEYS))
            target[key] = AUTO_MAP if key == "auto_map" else data.draw(values)
    elif how == "set":
        place[path[-1]] = data.draw(values)
    elif how == "delete":
        del place[path[-1]]
    elif isinstance(value, dict):
        value["model_type"] = data.draw(st.sampled_from(KINDS))
    return json.dumps(value)


def change_file(data, path, marker):
    """Leave something else in the place of a file."""
    content = path.read_bytes()
    how = data.draw(st.sampled_from(["json", "json", "json", "cut", "flip", "pickle", "other"]))
    if how == "json" and path.suffix == ".json":
        path.write_text(change_json(data, content.decode()))
    elif how == "json" and path.suffix == ".jsonl":
        first, _, rest = content.decode().partition("\n")
        path.write_text(f"{change_json(data, first)}\n{rest}")
    elif how == "json" and path.suffix == ".yaml":
        path.write_text(change_json(data, json.dumps(yaml.safe_load(content))))  # JSON is YAML
    elif how == "json" and path.suffix == ".safetensors":
        size = struct.unpack("<Q", content[:8])[0]
        header = change_json(data, content[8 : 8 + size].decode()).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    elif how == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif how == "pickle":
        value, buffer = {"state": Command(str(marker)), "a": torch.zeros(2)}, io.BytesIO()
        torch.save(value, buffer)
        path.unlink()
        if path.suffix == ".safetensors":
            path = path.with_name("pytorch_model.bin")
        path.write_bytes(data.draw(st.sampled_from([buffer.getvalue(), pickle.dumps(value, 2)])))
    elif how == "other":
        path.unlink()
        name = data.draw(st.sampled_from(["nothing", "pipe", "device", "folder", "pointer", "deep", "index"]))
        if name == "pipe":
            os.mkfifo(path)
        elif name == "device":
            path.symlink_to("/dev/zero")
        elif name == "folder":
            path.mkdir()
        elif name == "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
        elif name == "deep":
            path.write_text("[" * 100_000)
        elif name == "index":
            (path.parent / f"{path.name}.index.json").write_text(json.dumps({"weight_map": {"a": data.draw(values)}}))
    elif content:
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(changed)


def plant(folder, marker):
    """Code that whoever trusts the folder would run."""
    for place in (folder, folder / "text_tokenizer", folder / "custom_generate"):
        if place == folder or place.is_dir() or place.name == "custom_generate":
            place.mkdir(exist_ok=True)
            for name in ("evil.py", "generate.py"):
                (place / name).write_text(EVIL.format(marker=str(marker)))


@pytest.fixture(scope="module")
def asked():
    """Where something wanted to connect to, which it could not."""
    places = []

    def ask(*arguments, **_):
        places.append(arguments)
        raise OSError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_connection", "getaddrinfo"):
            patch.setattr(socket, name, ask)
        patch.setattr(socket.socket, "connect", ask)
        yield places


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=max(5, settings.default.max_examples // 4), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_wrong_is_said(whole, tmp_path_factory, asked, kind, data):
    place = tmp_path_factory.mktemp("hostile")
    folder, marker = place / "folder", place / "ran"
    shutil.copytree(whole / kind, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, "a.png"))
    plant(folder, marker)
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
        change_file(data, path, marker)
    if (folder / MANIFEST).exists() and data.draw(st.booleans()):
        seal(folder)
    start, said = time.perf_counter(), "read"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
        try:
            READERS[kind](folder)
        except (ValueError, OSError) as error:
            said = str(error)
    event("read" if said == "read" else "refused")
    assert said
    assert time.perf_counter() - start < 20
    assert not marker.exists()
    assert asked == []
    shutil.rmtree(place)

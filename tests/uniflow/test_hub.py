"""Repositories by name: from a cache on the disk and to a stand-in for the Hub; the network is never there."""

import importlib
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from tests.conftest import smooth_picture
from uniflow import EncoderTeacher, UniFlow, UniFlowConfig
from uniflow.cli import run
from uniflow.hub import local_folder

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, of the extra hub")
SCORES = {"psnr": 28.8231, "pictures": 64}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture
def cache(tiny, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out: blobs, and links to them by commit; branch main and tag v1."""
    repository = tmp_path / "cache" / "models--one--tokenizer"
    tiny().save_pretrained(tmp_path / "made")
    (tmp_path / "made" / "modeling_uniflow.py").write_text("raise SystemExit('executed')\n")
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "made").iterdir())):
        path.rename(repository / "blobs" / str(number))
        (repository / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number}")
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(COMMIT)
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def same(one, two):
    return all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize(
    ("name", "revision"),
    [("one/tokenizer", None), ("one/tokenizer", "v1"), ("one/tokenizer@v1", None), (f"one/tokenizer@{COMMIT}", None)],
)
def test_a_cached_repository_is_read_without_the_network(cache, tiny, name, revision):
    assert same(UniFlow.from_pretrained(name, revision=revision), tiny())


def test_the_cache_can_be_elsewhere_and_the_network_left_alone(cache, tiny, tmp_path, monkeypatch):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert same(UniFlow.from_pretrained("one/tokenizer", cache_dir=cache, local_files_only=True), tiny())
    with pytest.raises(
        FileNotFoundError, match="no such folder: one/tokenizer; and on the Hub one/tokenizer cannot be"
    ):
        UniFlow.from_pretrained("one/tokenizer", local_files_only=True)


def test_what_is_not_there_is_one_line(cache):
    for name in ("one/other", "one/tokenizer@v2"):
        with pytest.raises(
            FileNotFoundError, match=f"no such folder: {name}; and on the Hub {name} cannot be had"
        ) as no:
            UniFlow.from_pretrained(name)
        assert "\n" not in str(no.value)


def test_encoders_and_the_command_take_names(cache, tiny, tmp_path, capsys):
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(EncoderTeacher.from_pretrained("one/tokenizer").last(images), tiny().hidden_states(images)[-1])
    smooth_picture((16, 16), 0).save(tmp_path / "a.png")
    arguments = ["encode", str(tmp_path / "a.png"), "--out", str(tmp_path / "a.safetensors"), "--checkpoint"]
    assert run([*arguments, "one/tokenizer@v1"]) == 0
    assert run([*arguments, "one/other", "--force"]) == 2
    assert "on the Hub one/other cannot be had" in capsys.readouterr().err


def test_only_a_name_is_looked_for(tmp_path, monkeypatch):
    """Not a path with a slip in it, and nothing that a folder says."""

    def asked(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for path in ("out/demo", "nowhere", "a/b/c", "./a/b", "../a", "/a/b", "~/a", "a/b@", "a b/c", "-a/b"):
        with pytest.raises(FileNotFoundError, match=r"no such folder|No such file"):
            UniFlow.from_pretrained(path)
    with pytest.raises(ValueError, match=r"revision: expected it of a repository on the Hub, .* got the folder out"):
        local_folder("out", revision="v1")
    with pytest.raises(ValueError, match="revision: expected it once, got 'v1' and 'v2' in the name"):
        local_folder("one/tokenizer@v2", revision="v1")


def test_weights_are_asked_for_once_and_code_never(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns, **_):
        asked.append(allow_patterns)
        if "*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert local_folder("one/tokenizer") == tmp_path
    assert [pattern for patterns in asked for pattern in patterns[-1:]] == ["*.safetensors", "*.bin"]
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    local_folder("one/tokenizer")
    assert len(asked) == 1
    assert not any(Path("modeling_uniflow.py").match(pattern) for patterns in asked for pattern in patterns)


def test_a_model_is_pushed_with_its_card(tiny, tmp_path, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token):
            pushed["token"] = token

        def create_repo(self, name, private, exist_ok):
            pushed["made"] = (name, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            pushed["files"] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            pushed["to"] = (repo_id, revision, commit_message)
            return SimpleNamespace(commit_url="https://hub/one/mine/commit/1")

    monkeypatch.setitem(vars(hub), "HfApi", Api)
    model = tiny()
    where = model.push_to_hub(
        "one/mine", licence="mit", scores={"psnr": 28.8231, "pictures": 64}, private=True, token="t"
    )
    assert where == "https://hub/one/mine/commit/1"
    assert (pushed["token"], pushed["made"]) == ("t", ("one/mine", True, True))
    assert pushed["to"] == ("one/mine", None, "Upload a UniFlow")
    assert sorted(pushed["files"]) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    for name, data in pushed["files"].items():
        (tmp_path / name).write_bytes(data)
    assert same(UniFlow.from_pretrained(tmp_path), model)
    _, head, card = pushed["files"]["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(head)
    assert (data["license"], data["library_name"]) == ("mit", "uniflow-kernels")
    assert 'UniFlow.from_pretrained("one/mine")' in card
    assert f"| all | {sum(p.numel() for p in model.parameters()):,} |" in card
    assert "| latent_ch | 8 |" in card
    assert "| psnr | 28.8231 |" in card
    model.push_to_hub("one/mine")
    silent = pushed["files"]["README.md"].decode()
    assert "icen" not in silent
    assert "Scores" not in silent
    for wrong in ("mine", "one/mine@main", "https://hub/one/mine"):
        with pytest.raises(ValueError, match="repository: expected OWNER/NAME, got "):
            model.push_to_hub(wrong)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'uniflow-kernels\[hub\]'"):
        UniFlow.from_pretrained("one/tokenizer")
    with pytest.raises(ImportError, match=r"pip install 'uniflow-kernels\[hub\]'"):
        UniFlow(UniFlowConfig.preset("tiny")).push_to_hub("one/tokenizer")

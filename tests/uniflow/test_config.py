import json
import warnings

import pytest

from uniflow import UniFlowConfig


def test_base_is_the_official_release():
    config = UniFlowConfig.preset("base")
    assert config == UniFlowConfig()
    assert (config.image_size, config.patch_size, config.num_hidden_layers, config.hidden_size) == (448, 14, 24, 1024)
    assert (config.latent_ch, config.global_blocks_depth, config.num_decoder_layers) == (64, 6, 12)
    assert config.tokens == 1024
    assert config.sampling_steps == 1


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_presets_can_take_the_noise_away_in_one_step(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UniFlowConfig.preset(name)


def test_a_head_narrower_than_its_patch_is_warned_of():
    with pytest.warns(UserWarning, match=r"flow_width: .* 576 .* 588.* one step"):
        UniFlowConfig(hidden_size=576, vit_hidden_size=576, num_attention_heads=9)


def test_a_flow_width_of_its_own_mends_that_and_is_written_where_it_is_not_the_releases():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = UniFlowConfig(hidden_size=576, vit_hidden_size=576, num_attention_heads=9, flow_width=640)
    assert (config.head_width, config.to_dict()["flow_width"]) == (640, 640)
    assert UniFlowConfig.from_dict(config.to_dict()).head_width == 640
    official = UniFlowConfig(flow_width=1024, latent_noise=0)
    assert official == UniFlowConfig()
    assert not {"flow_width", "latent_noise"} & official.to_dict().keys()
    assert UniFlowConfig.from_dict(UniFlowConfig(latent_noise=0.5).to_dict()).latent_noise == 0.5


def test_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="preset: expected one of tiny, small, base, got 'huge'"):
        UniFlowConfig.preset("huge")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("image_size", {"image_size": 450}),
        ("image_size", {"image_size": "448"}),
        ("patch_size", {"patch_size": 0}),
        ("num_hidden_layers", {"num_hidden_layers": True}),
        ("num_attention_heads", {"num_attention_heads": 24}),
        ("vit_hidden_size", {"vit_hidden_size": 768}),
        ("vit_hidden_size", {"hidden_size": 600, "vit_hidden_size": 600, "num_attention_heads": 10}),
        ("global_blocks_depth", {"global_blocks_depth": -1}),
        ("norm_type", {"norm_type": "batch_norm"}),
        ("hidden_act", {"hidden_act": "tanh"}),
        ("decoder_type", {"decoder_type": "transformer"}),
        ("use_chal_proj", {"use_chal_proj": False}),
        ("use_global_blocks", {"use_global_blocks": False}),
        ("drop_path_rate", {"drop_path_rate": 1.0}),
        ("dropout", {"dropout": "much"}),
        ("layer_norm_eps", {"layer_norm_eps": 0}),
        ("flow_width", {"flow_width": 0}),
        ("flow_width", {"flow_width": "wide"}),
        ("latent_noise", {"latent_noise": -0.1}),
        ("latent_noise", {"latent_noise": "some"}),
        ("num_sampling_steps", {"num_sampling_steps": "0"}),
        ("num_sampling_steps", {"num_sampling_steps": 1.5}),
        # what no machine could hold is refused before anything is made, and so is what is no number
        ("image_size", {"image_size": 4 * 10**9, "patch_size": 10**6}),
        ("patch_size", {"patch_size": 1 << 11, "image_size": 1 << 11}),
        ("num_channels", {"num_channels": 65}),
        ("hidden_size", {"hidden_size": 10**12, "vit_hidden_size": 10**12}),
        ("intermediate_size", {"intermediate_size": 10**12}),
        ("num_hidden_layers", {"num_hidden_layers": 10**9}),
        ("global_blocks_depth", {"global_blocks_depth": 10**9}),
        ("num_decoder_layers", {"num_decoder_layers": 10**9}),
        ("latent_ch", {"latent_ch": 10**9}),
        ("num_sampling_steps", {"num_sampling_steps": "9" * 5000}),
        ("num_sampling_steps", {"num_sampling_steps": 10**9}),
        ("layer_norm_eps", {"layer_norm_eps": float("nan")}),
        ("layer_norm_eps", {"layer_norm_eps": float("inf")}),
        ("dropout", {"dropout": float("nan")}),
        ("initializer_range", {"initializer_range": float("nan")}),
        ("initializer_factor", {"initializer_factor": "1"}),
        ("qkv_bias", {"qkv_bias": None}),
        ("norm_type", {"norm_type": ["layer_norm"] * 10**4}),
        ("flow_times", {"flow_times": 3}),
    ],
)
def test_a_contradiction_names_the_field(field, changes):
    with pytest.raises(ValueError, match=f"^{field}: ") as caught:
        UniFlowConfig(**changes)
    assert len(str(caught.value)) < 300


def test_no_global_blocks_is_no_contradiction():
    assert UniFlowConfig(use_global_blocks=False, global_blocks_depth=0).global_blocks_depth == 0


def test_reads_the_official_file_and_writes_it_back(golden_folder, tmp_path):
    official = json.loads((golden_folder / "config.json").read_text())
    config = UniFlowConfig.from_pretrained(golden_folder)
    assert config.hidden_size == 64
    assert config.use_flash_attn
    config.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == official


def test_keys_of_others_survive(golden_folder, tmp_path):
    official = json.loads((golden_folder / "config.json").read_text())
    official["auto_map"] = {"AutoModel": "modeling_uniflow.UniFlowVisionModel"}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": official, "model_type": "some_vlm"}))
    assert UniFlowConfig.from_pretrained(tmp_path).to_dict() == official


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object, got list"),
        (
            '{"model_type": "siglip"}',
            "model_type: expected one of 'uniflow', 'uniflow_few_steps', 'uniflow_with_encoder', got 'siglip'",
        ),
        ('{"hidden_size": 1024}', "lacks image_size, patch_size, intermediate_size"),
        ('{"vision_config": null}', "vision_config: expected an object, got None"),
        (
            '{"model_type": {"a": [1, 2]}}',
            "model_type: expected one of 'uniflow', 'uniflow_few_steps', 'uniflow_with_encoder', got {'a': ",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        UniFlowConfig.from_pretrained(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        UniFlowConfig.from_pretrained(tmp_path)

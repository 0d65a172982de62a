"""The official base preset."""

import torch

from uniflow import UniFlow, UniFlowConfig


def expected_keys():
    keys = {"global_block_pos_embed", "decoder_pos_embed"}
    keys |= {f"embeddings.{n}" for n in ("class_embedding", "position_embedding")}
    keys |= {f"embeddings.patch_embedding.{n}" for n in ("weight", "bias")}
    layer = [
        f"{m}.{n}"
        for m in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for n in ("weight", "bias")
    ]
    keys |= {f"encoder.layers.{i}.{n}" for i in range(24) for n in (*layer, "ls1", "ls2")}
    keys |= {f"global_blocks.{i}.{n}" for i in range(6) for n in layer}
    keys |= {
        f"{p}.{c}.{n}" for p in ("chal_proj", "chal_unproj") for c in ("c_fc", "c_proj") for n in ("weight", "bias")
    }
    head = ["time_embed.mlp.0", "time_embed.mlp.2", "cond_embed", "input_proj"]
    head += [f"res_blocks.{i}.{m}" for i in range(12) for m in ("in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1")]
    head += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    return keys | {f"flow_head.net.{m}.{n}" for m in head for n in ("weight", "bias")}


def test_keys_and_counts():
    with torch.device("meta"):
        model = UniFlow(UniFlowConfig.preset("base"))
    state = model.state_dict()
    assert len(state) == 530
    assert state.keys() == expected_keys()
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    assert sum(p.numel() for p in model.parameters()) == 452_586_124
    assert count["encoder"] == 24 * (12 * 1024**2 + 15 * 1024)
    assert state["embeddings.position_embedding"].shape == (1, 1025, 1024)
    assert state["chal_proj.c_proj.weight"].shape == (64, 1024)
    assert state["flow_head.net.final_layer.linear.weight"].shape == (588, 1024)


def test_runs_at_its_size_and_widths():
    """With two of the layers that are alike: all of them are in `test_keys_and_counts`."""
    torch.manual_seed(0)
    with torch.device("meta"):
        config = UniFlowConfig.preset("base", num_hidden_layers=2, global_blocks_depth=2, num_decoder_layers=2)
        model = UniFlow(config).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():  # uniform numbers are drawn in a fraction of the time of those that a new model gets
        for name, parameter in model.named_parameters():
            spread = 1 if name.endswith(("embed", "embedding")) else 0.06 if parameter.ndim > 1 else 0.5
            parameter.uniform_(-spread, spread)
    with torch.inference_mode():
        latents = model.encode(torch.randn(1, 3, 448, 448))
        image = model.decode(latents, steps=1)
    assert latents.shape == (1, 1024, 64)
    assert image.shape == (1, 3, 448, 448)
    assert latents.dtype == image.dtype == torch.bfloat16
    assert torch.isfinite(image).all()
    assert image.float().std() > 0.1

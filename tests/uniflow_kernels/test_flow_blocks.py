"""The blocks of the flow head, every option: the definition against formulas, kernels against the definition."""

import pytest
import torch

from tests.conftest import randomize
from uniflow_kernels import FlowHead, fused_flow_blocks
from uniflow_kernels.ops.flow_head import Affine, Block

OPTIONS = {
    "canonical": {},
    "rms": {"norm": "rms", "eps": 1e-5},
    "swiglu": {"mlp": "swiglu", "hidden": 88},
    "hidden": {"hidden": 24},
    "no bias": {"bias": False},
    "scale first": {"modulation_order": "scale-shift-gate"},
    "groups": {"modulation_groups": 2},
    "one group": {"modulation_groups": 1},
    "no final modulation": {"final_modulation": False},
    "VibeVoice": {"norm": "rms", "eps": 1e-5, "mlp": "swiglu", "hidden": 72, "bias": False},
    "SphereAR": {"mlp": "swiglu", "hidden": 96, "modulation_order": "scale-shift-gate", "modulation_groups": 2},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def make_head(width=64, depth=4, **options):
    return randomize(FlowHead(24, width, 24, 40, depth, **options))


def tensors_of(head, dtype=None):
    """The head's blocks as the functional form takes them, and all their tensors in a list."""
    every = []

    def affine(module):
        pair = [module.weight, getattr(module, "bias", None)]
        pair = [None if p is None else p.detach().to(dtype or p.dtype).requires_grad_() for p in pair]
        every.extend(p for p in pair if p is not None)
        return Affine(*pair)

    def ends(mlp):
        return (mlp.w12, mlp.w3) if hasattr(mlp, "w12") else (mlp[0], mlp[2])

    blocks = [Block(affine(b.in_ln), *map(affine, ends(b.mlp))) for b in head.res_blocks]
    modulations = [affine(b.adaLN_modulation[1]) for b in head.res_blocks if hasattr(b, "adaLN_modulation")]
    last = head.final_layer.adaLN_modulation
    return (blocks, modulations, None if last is None else affine(last[1])), every


def keywords(head):
    return head.form._asdict()


def written_out(x, y, blocks, modulations, final, norm="layer", eps=1e-6, mlp="silu", modulation_order=None):
    """The formulas of the release and its relatives, row by row."""
    a = y * torch.sigmoid(y)

    def linear(x, affine):
        out = x @ affine.weight.T
        return out if affine.bias is None else out + affine.bias

    def normalized(x):
        if norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def parts(modulation):
        width = x.shape[-1]
        pieces = [modulation[..., i : i + width] for i in range(0, modulation.shape[-1], width)]
        if modulation_order == "scale-shift-gate":
            pieces[:2] = pieces[1::-1]
        return pieces

    for i, block in enumerate(blocks):
        shift, scale, gate = parts(linear(a, modulations[i * len(modulations) // len(blocks)]))
        h = normalized(x) * block.norm.weight
        if block.norm.bias is not None:
            h = h + block.norm.bias
        p = linear(h * (1 + scale) + shift, block.up)
        hidden = block.down.weight.shape[1]
        u = p[..., :hidden] * torch.sigmoid(p[..., :hidden])
        if mlp == "swiglu":
            u = u * p[..., hidden:]
        x = x + gate * linear(u, block.down)
    h = normalized(x)
    if final is None:
        return h
    shift, scale = parts(linear(a, final))
    return h * (1 + scale) + shift


def inputs(rows=(19,), conditions=(19,), width=64, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*shape, width, generator=generator).to(dtype) for shape in (rows, conditions))
    return x.requires_grad_(), y.requires_grad_()


def run(function, x, y, weights, every, **form):
    """The output and the gradients of x, y and every tensor."""
    out = function(x, y, *weights, **form)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * cotangent).sum(), [x, y, *every])]


@options
def test_the_definition(within_twice, options):
    head = make_head(**options)
    results = []
    for function, dtype in (
        (fused_flow_blocks, torch.float32),
        *((written_out, d) for d in (torch.float32, torch.float64)),
    ):
        x, y = inputs(dtype=dtype)
        results.append(run(function, x, y, *tensors_of(head, dtype), **keywords(head)))
    for ours, plain, exact in zip(*results, strict=True):
        within_twice(ours, plain, exact, floor=2e-6)


@options
def test_the_module_is_the_functional_form_between_two_products(options):
    head = make_head(**options)
    x, c = torch.randn(7, 24), torch.randn(7, 40)
    y = head.time_embed(torch.arange(7.0)) + head.cond_embed(c)
    weights, _ = tensors_of(head)
    inner = fused_flow_blocks(head.input_proj(x), y, *weights, **keywords(head))
    assert torch.allclose(head(x, torch.arange(7.0), c), head.final_layer.linear(inner), atol=1e-5)


@options
def test_gradcheck(options):
    head = make_head(width=8, depth=2, **{**options, "hidden": 6})
    x, y = inputs((3,), (3,), width=8, dtype=torch.float64)
    weights, every = tensors_of(head, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *_: fused_flow_blocks(x, y, *weights, **keywords(head)), [x, y, *every], fast_mode=True
    )


def test_names_of_parameters():
    names = [name for name, _ in make_head(depth=2, mlp="swiglu", modulation_groups=1).named_parameters()]
    assert "res_blocks.0.mlp.w12.weight" in names
    assert "res_blocks.1.mlp.w3.bias" in names
    assert [name for name in names if "adaLN" in name and "res_blocks" in name] == [
        "res_blocks.0.adaLN_modulation.1.weight",
        "res_blocks.0.adaLN_modulation.1.bias",
    ]
    names = [name for name, _ in make_head(bias=False, norm="rms", final_modulation=False).named_parameters()]
    assert not any(name.endswith("bias") or "final_layer.adaLN" in name for name in names)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("norm", {"norm": "batch"}),
        ("mlp", {"mlp": "gelu"}),
        ("modulation_order", {"modulation_order": "gate-scale-shift"}),
        ("recompute", {"recompute": "all"}),
        ("modulation_groups", {"modulation_groups": 3}),
        ("modulation_groups", {"modulation_groups": 0}),
    ],
)
def test_options_that_do_not_exist(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got {next(iter(wrong.values()))!r}"):
        FlowHead(24, 64, 24, 40, 4, **wrong)


def test_tensors_that_do_not_fit():
    (blocks, modulations, final), _ = tensors_of(make_head())
    x, y = inputs()
    narrow = Affine(torch.zeros(64, 63))
    for match, arguments in {
        r"^y: expected \[\.\.\., 64\], broadcastable to x's \(19, 64\), got \(18, 64\)": (
            x,
            y[1:],
            blocks,
            modulations,
        ),
        "^blocks: expected at least one": (x, y, [], modulations),
        "^modulations: expected a divisor of the 4 blocks, got 3": (x, y, blocks, modulations[:3]),
        r"^blocks\[1\]\.up\.weight: expected shape \(64, 64\), got \(64, 63\)": (
            x,
            y,
            [blocks[0], blocks[1]._replace(up=narrow), *blocks[2:]],
            modulations,
        ),
        r"^modulations\[0\]\.bias: expected shape \(192,\), got \(3,\)": (
            x,
            y,
            blocks,
            [Affine(modulations[0].weight, torch.zeros(3)), *modulations[1:]],
        ),
        r"^final_modulation\.weight": (x, y, blocks, modulations, narrow),
        "^x: expected": (x.int(), y, blocks, modulations),
    }.items():
        with pytest.raises(ValueError, match=match):
            fused_flow_blocks(*arguments)
    with pytest.raises(ValueError, match="an rms norm has no bias"):
        fused_flow_blocks(x, y, blocks, modulations, final, norm="rms")

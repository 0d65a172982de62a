"""The blocks of the flow head, every option: the definition against formulas, kernels against the definition."""

import pytest
import torch
import triton
import triton.language as tl
from torch.distributed.fsdp import fully_shard

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend, cpu_kernels, fused_flow_blocks
from uniflow_kernels.ops import flow_head
from uniflow_kernels.ops.flow_blocks import Affine, Block, in_order
from uniflow_kernels.ops.flow_head import RECOMPUTE
from uniflow_kernels.ops.flow_passes import Pass
from uniflow_kernels.triton_kernels import products

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
KERNELS = ("rows", "products")  # of which the small products are those in other tiles
paths = pytest.mark.parametrize("path", KERNELS)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


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


def against_definition(
    within_twice, head, rows, conditions, dtype=torch.float32, recompute="none", floor=2e-6, path="rows"
):
    """Kernels in `dtype` against the definition in the same dtype and in float64, forward and every gradient."""
    width = head.model_channels
    results = []
    for name, precision in (("triton", dtype), ("eager", dtype), ("eager", torch.float64)):
        # every form is given the numbers of `dtype`
        x, y = (t.detach().to(precision).requires_grad_() for t in inputs(rows, conditions, width, dtype))
        weights, every = tensors_of(head.to(dtype), precision)
        how = {**keywords(head), "recompute": recompute, "path": path if name == "triton" else "auto"}
        with backend(name):
            results.append(run(fused_flow_blocks, x, y, weights, every, **how))
    for ours, plain, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        within_twice(ours, plain, exact, floor=floor)


recomputes = pytest.mark.parametrize("recompute", RECOMPUTE)


def head_for(path, width=64, **options):
    """A head of two blocks; of four, if blocks share a modulation."""
    groups = options.get("modulation_groups")
    if groups and path == "products":
        pytest.skip("blocks share a modulation")
    return make_head(width, 4 if groups else 2, **options)


@options
@paths
def test_kernels(within_twice, options, path):
    against_definition(within_twice, head_for(path, **{"hidden": 40, **options}), (17,), (17,), path=path)


@recomputes
@paths
@pytest.mark.parametrize("name", ["canonical", "SphereAR", "no final modulation"])
def test_recomputing(within_twice, name, recompute, path):
    head = head_for(path, 24, **OPTIONS[name])
    against_definition(within_twice, head, (9,), (9,), recompute=recompute, path=path)


@pytest.mark.parametrize(
    ("rows", "width", "path"),
    [
        *[(1, 1536, "rows"), (17, 588, "rows"), (129, 100, "rows"), (300, 40, "rows"), (5, 768, "rows")],
        *[(1, 588, "products"), (129, 100, "products"), (1030, 24, "products")],  # the last in two rounds of tiles
        *[(1, 588, "small products"), (129, 100, "small products")],
    ],
)
def test_kernels_at_odd_sizes(within_twice, rows, width, path):
    against_definition(within_twice, make_head(width, depth=1), (rows,), (rows,), path=path)


@pytest.mark.parametrize(("target", "width", "rows"), [(16, 24, 300), (588, 100, 17), (768, 72, 5), (588, 1536, 2)])
def test_targets_of_the_module(within_twice, target, width, rows):
    head = randomize(FlowHead(target, width, target, 40, 1))
    data = torch.randn(rows, target), 1000 * torch.rand(rows), torch.randn(rows, 40)
    with backend("triton"):
        ours = module_results(head, *data)
    plain = module_results(head, *data)
    exact = module_results(head.double(), *(t.double() for t in data))
    for results in zip(ours, plain, exact, strict=True):
        within_twice(*results, floor=2e-6)


@paths
@pytest.mark.parametrize(("name", "dtype"), [("canonical", torch.float16), ("VibeVoice", torch.bfloat16)])
def test_kernels_in_half_precision(within_twice, name, dtype, path):
    head = make_head(96, depth=2, **OPTIONS[name])
    against_definition(within_twice, head, (70,), (70,), dtype, floor=1e-3, path=path)


@pytest.mark.parametrize("arch", [80, 90])
def test_products_as_they_are_made_on_a_gpu(within_twice, monkeypatch, arch):
    """Its tiles, and descriptors where it has them, in the interpreter; the widths end inside a tile.

    tests/ptx has those of a canonical head.
    """
    monkeypatch.setitem(products.ARCHITECTURES, 0, products.ARCHITECTURES[arch])
    head = make_head(136, depth=1, **{**OPTIONS["VibeVoice"], "hidden": 144})
    against_definition(within_twice, head, (130,), (130,), torch.float16, floor=1e-3, path="products")


@pytest.mark.parametrize(
    ("rows", "conditions"),
    [
        ((37,), (1,)),  # one for all
        ((3, 40), (3, 1)),  # one for rows that follow each other
        ((5, 6), (5, 1)),  # the same, few enough to be written row by row
        ((4, 9), (9,)),  # one for every ninth row
        ((2, 3, 20), (3, 1)),  # both
        ((2, 3, 4), (2, 1, 4)),  # no such pattern: expanded
        ((2, 9), (2, 9)),
    ],
)
def test_shared_conditions(within_twice, rows, conditions):
    """Of rows, and with it of blocks: two blocks of each group, whose gradients are added up."""
    for name, depth, recompute in (("canonical", 2, "none"), ("SphereAR", 4, "block")):
        head = make_head(24, depth=depth, **{**OPTIONS[name], "hidden": 20})
        against_definition(within_twice, head, rows, conditions, recompute=recompute)


@paths
def test_strided_inputs_and_expanded_gradients(path):
    head = make_head(depth=2)
    weights, every = tensors_of(head)
    x, y = inputs((20,), (20,))

    def gradients(x, y):
        out = fused_flow_blocks(x, y, *weights, path=path)
        (reduced,) = torch.autograd.grad(out.sum(), x, retain_graph=True)  # an expanded gradient, of stride 0
        return [out, reduced, *torch.autograd.grad(out.t().contiguous().t(), [x, y, *every], torch.ones_like(out))]

    def strided(t):
        return t.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()

    def transposed(t):
        return t.detach().t().contiguous().t().requires_grad_()

    with backend("triton"):
        expected = gradients(x, y)
        for change in (strided, transposed):
            for ours, theirs in zip(gradients(change(x), change(y)), expected, strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)  # PyTorch's own SiLU(y) rounds otherwise


@pytest.mark.parametrize("conditions", [0, 1])
def test_no_rows(conditions):
    head = make_head(depth=2)
    weights, every = tensors_of(head)
    x, y = inputs((0,), (conditions,))
    with backend("triton"):
        out = fused_flow_blocks(x, y, *weights)
        gradients = torch.autograd.grad(out.sum(), [x, y, *every])
    assert out.shape == (0, 64)
    assert all(not gradient.any() for gradient in gradients)


@paths
def test_every_output_is_written(path):
    """Memory that nobody wrote is NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        head = make_head(40, depth=2)
        shared = ((2, 17), (2, 1)) if path == "rows" else ((34,), (34,))
        for rows, conditions, recompute in (((33,), (33,), "none"), (*shared, "none"), ((5,), (5,), "block")):
            weights, every = tensors_of(head)
            how = {"recompute": recompute, "path": path}
            with backend("triton"):
                results = run(fused_flow_blocks, *inputs(rows, conditions, 40), weights, every, **how)
            assert all(torch.isfinite(result).all() for result in results)
    finally:
        torch.use_deterministic_algorithms(False)


@paths
def test_runs_are_equal_to_the_bit(path):
    head = make_head(40, depth=2)
    weights, every = tensors_of(head)
    with backend("triton"):
        first = run(fused_flow_blocks, *inputs((50,), (50,), 40), weights, every, path=path)
        for recompute in RECOMPUTE:
            how = {"recompute": recompute, "path": path}
            again = run(fused_flow_blocks, *inputs((50,), (50,), 40), weights, every, **how)
            # products of gate and of shift and scale, apart or together or by another kernel, may round differently
            exact = recompute == "none" or path == "rows"
            for one, other in zip(first, again, strict=True):
                assert torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@paths
def test_inference_and_frozen_weights(path):
    head = make_head(depth=3)
    weights, every = tensors_of(head)
    x, y = inputs()
    with backend("triton"):
        out, dx, dy, *_ = run(fused_flow_blocks, x, y, weights, every, path=path)
        with torch.inference_mode():
            before = x.clone()
            assert torch.equal(fused_flow_blocks(x, y, *weights, path=path), out)
            assert torch.equal(x, before)
        for tensor in every:
            tensor.requires_grad_(False)
        frozen = run(fused_flow_blocks, x, y, weights, [], path=path)
    assert torch.equal(frozen[1], dx)
    assert torch.equal(frozen[2], dy)


def module_results(head, x, t, c, function=None):
    """The output and the gradients of all parameters; `function` is the head in another form."""
    out = (head if function is None else function)(x, t, c)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), list(head.parameters()))]


@pytest.mark.parametrize("name", ["canonical", "VibeVoice", "SphereAR", "no final modulation"])
def test_module(within_twice, name):
    """`test_kernels` has every option, and `test_the_module_is_the_functional_form_between_two_products` the rest."""
    options = OPTIONS[name]
    head = make_head(depth=2, **{**options, **({"modulation_groups": 1} if "modulation_groups" in options else {})})
    data = torch.randn(21, 24), 1000 * torch.rand(21), torch.randn(21, 40)
    plain = module_results(head, *data)
    exact = module_results(head.double(), *(t.double() for t in data))
    head.float()
    for recompute in RECOMPUTE:
        head.recompute = recompute
        with backend("triton"):
            ours = module_results(head, *data)
        for results in zip(ours, plain, exact, strict=True):
            within_twice(*results, floor=2e-6)


def test_autocast(within_twice):
    head = make_head(depth=2)
    data = torch.randn(200, 24), 1000 * torch.rand(200), torch.randn(200, 40)
    exact = module_results(head.double(), *(t.double() for t in data))
    head.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = module_results(head, *data)
        with backend("triton"):
            ours = module_results(head, *data)
    assert ours[0].dtype == torch.bfloat16
    for results in zip(ours, plain, exact, strict=True):
        within_twice(*results, floor=1e-3)


def test_autocast_casts_once_while_nothing_changes(monkeypatch):
    """Without gradients; a step between two calls is seen. Weights of autocast's own dtype are taken as they are."""
    head = make_head(depth=2)
    x, y = (t.detach() for t in inputs())
    cast, given = flow_head._cast, []
    monkeypatch.setattr(flow_head, "_cast", lambda *what: given.append(cast(*what)) or given[-1])
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, fused=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16), backend("triton"):
            return fused_flow_blocks(x, y, *head.tensors())

    with torch.no_grad():
        first, again = run(), run()
    run().sum().backward()
    gradient = head.res_blocks[0].mlp[0].weight.grad
    optimizer.step()
    with torch.no_grad():
        changed = run()
        head.bfloat16()
        run()
    ups = [blocks[0].up.weight for blocks, *_ in given]
    assert ups[0].dtype == torch.bfloat16
    assert ups[0] is ups[1]
    assert ups[2].requires_grad
    assert gradient.any()
    assert torch.equal(ups[3], head.res_blocks[0].mlp[0].weight)
    assert ups[4] is head.res_blocks[0].mlp[0].weight
    assert torch.equal(first, again)
    assert not torch.equal(first, changed)


def test_gradient_checkpointing_and_functional_call():
    head = make_head(depth=2)
    data = torch.randn(21, 24), torch.rand(21), torch.randn(21, 40)
    with backend("triton"):
        expected = module_results(head, *data)
        head.grad_checkpointing = True
        assert all(map(torch.equal, module_results(head, *data), expected))
        head.grad_checkpointing = False
        again = torch.utils.checkpoint.checkpoint(head, *data, use_reentrant=False)
        gradients = torch.autograd.grad(again.square().sum(), list(head.parameters()))
        assert all(map(torch.equal, [again, *gradients], expected))
        changed = {name: 2 * parameter.detach() for name, parameter in head.named_parameters()}
        out = torch.func.functional_call(head, changed, data)
        head.load_state_dict(changed)
        assert torch.equal(head(*data), out)
        assert not torch.equal(out, expected[0])


def test_parameters_that_change_in_place_are_seen():
    head = make_head(depth=2)
    data = torch.randn(9, 24), torch.rand(9), torch.randn(9, 40)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with backend("triton"):
        head(*data).square().sum().backward()
        optimizer.step()
        ours = head(*data)
    assert torch.allclose(ours, head(*data), atol=1e-4)


def test_submodules_that_are_more_than_their_tensors():
    """Hooks and replaced layers must act: the plain form calls them, and a backend asked for by name says why not."""
    data = torch.randn(9, 24), torch.rand(9), torch.randn(9, 40)

    def hook(head):
        head.res_blocks[1].mlp[0].register_forward_hook(lambda module, args, out: out + 1)

    def replace(head):
        head.res_blocks[0].mlp[1] = torch.nn.GELU()

    def replace_by_a_part_of_another_place(head):
        head.res_blocks[1].mlp[1] = torch.nn.Sequential()

    def remove(head):
        head.res_blocks = head.res_blocks[:1]

    def change_eps(head):
        head.res_blocks[1].in_ln.eps = 10.0

    def wrap(head):
        block = head.res_blocks[0]
        block.forward = lambda *args: type(block).forward(block, *args) * torch.linspace(-1, 1, 64)

    for change in (hook, replace, replace_by_a_part_of_another_place, remove, change_eps, wrap):
        head = make_head(depth=2)
        before = head(*data)
        change(head)
        assert not torch.allclose(head(*data), before)
        with backend("triton"), pytest.raises(ValueError, match="a submodule was replaced, wrapped or given a hook"):
            head(*data)


@pytest.mark.parametrize("bias", [True, False])
def test_replicas_that_hold_their_parameters_as_attributes(bias):
    """As those of DataParallel do, which needs GPUs."""
    head = make_head(depth=2, bias=bias)
    data = torch.randn(9, 24), torch.rand(9), torch.randn(9, 40)
    with backend("triton"):
        before = head(*data)
        for module in head.modules():
            held = {name: p for name, p in module._parameters.items() if p is not None}
            for name, parameter in held.items():
                delattr(module, name)
                setattr(module, name, parameter.detach())
        assert not list(head.parameters())
        assert torch.equal(head(*data), before)


def test_what_the_kernels_cannot_serve_is_said():
    (blocks, modulations, final), _ = tensors_of(make_head(depth=2))
    x, y = inputs()
    with backend("triton"):
        with pytest.raises(ValueError, match=r"flow_head: .*float32, float16 and bfloat16, not torch\.float64"):
            fused_flow_blocks(x.double(), y.double(), blocks, modulations, final)
        with pytest.raises(ValueError, match="x, y and the weights of the products are not of one dtype"):
            fused_flow_blocks(x.half(), y.half(), blocks, modulations, final)
        with pytest.raises(ValueError, match=r"no rules for the transforms of torch\.func"):
            torch.func.jvp(lambda x: fused_flow_blocks(x, y, blocks, modulations, final), (x,), (x,))
    with backend("cuda"), pytest.raises(ValueError, match="flow_head has no such kernel"):
        fused_flow_blocks(x, y, blocks, modulations, final)
    # what nobody asked for by name is served by the plain form
    out, _ = torch.func.jvp(lambda x: fused_flow_blocks(x, y, blocks, modulations, final), (x,), (x,))
    torch.testing.assert_close(out, fused_flow_blocks(x, y, blocks, modulations, final))  # its norms are written out


@pytest.mark.parametrize(
    ("recompute", "shared", "products_from"),
    [("block", True, None), ("none", False, 20)],
)
def test_compiles_whole_without_recompiling_for_another_number_of_rows(monkeypatch, recompute, shared, products_from):
    """Nor for another path: each pass chooses it while it runs."""
    taken = []
    if products_from:
        order = "uniflow_kernels.ops.flow_choice._order"
        monkeypatch.setattr(order, lambda call: taken.append(call) or KERNELS[call.rows >= products_from :])
    head = make_head(32, depth=2, recompute=recompute)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)

    def results(function, m):
        generator = torch.Generator().manual_seed(0)
        shapes = (m, 24), (m,), (1 if shared else m, 40)
        return module_results(head, *(torch.randn(shape, generator=generator) for shape in shapes), function)

    with torch._dynamo.config.patch(error_on_recompile=True), backend("triton"):
        for m in (37, 5, 64):
            for ours, theirs in zip(results(compiled, m), results(head, m), strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # of the compiled one each pass asks, of the other one the whole
    assert [call.rows for call in taken] == ([37] * 3 + [5] * 3 + [64] * 3 if products_from else [])


@pytest.mark.parametrize(
    ("options", "keep", "path"),
    [
        *[(OPTIONS["canonical"], keep, "rows") for keep in ("all", "inputs")],
        *[(OPTIONS["SphereAR"], keep, "auto") for keep in ("nothing", "all", "inputs")],
        (OPTIONS["canonical"], "all", "products"),
    ],
)
def test_registered_ops(options, keep, path):
    head = make_head(16, depth=2, **{**options, **({"modulation_groups": 1} if options else {})})
    (blocks, modulations, final), _ = tensors_of(head)
    weights = [t for pair in in_order(blocks, modulations, final) for t in pair]
    weights = [None if t is None else t.detach() for t in weights]
    repeat = 1 if path == "products" else 2
    x, y = (t.detach() for t in inputs((6,), (6 // repeat,), 16))
    how = (2, repeat, *head.form, keep)
    ops = torch.ops.uniflow_kernels
    torch.library.opcheck(ops.flow_blocks.default, (x, y, weights, *how, path))
    if keep != "nothing":
        _, kept = ops.flow_blocks(x, y, weights, *how, path)
        torch.library.opcheck(ops.flow_blocks_backward.default, (x, x, y, weights, kept, *how, True, path))


# modulations that were made before


def modulated(head, x, modulations, weights, name):
    """The blocks of `head` on a backend, with the tensors given in the place of its own."""
    with torch.no_grad(), backend(name):
        blocks = flow_head.ModulatedBlocks(*weights, head.form, x, len(x))
        assert blocks.path(len(x)) == ("rows" if name == "triton" else "eager")
        return blocks(x, modulations)


def made_before(head, weights, steps=3, rows=19, dtype=torch.float32):
    """x [R, W], conditions [S, R, W], and the modulations of the steps, views of what all steps share."""
    x, y = inputs((rows,), (steps, rows), dtype=dtype)
    with torch.no_grad(), backend("eager"):
        return x.detach(), y, flow_head.ModulatedBlocks(*weights, head.form, x, rows).modulations(y)


@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulations_made_before(within_twice, options, dtype):
    """On both backends as good as `fused_flow_blocks`, which makes them itself; they are only read."""
    head = make_head(**options)
    weights, _ = tensors_of(head, dtype)
    x, y, steps = made_before(head, weights, dtype=dtype)
    assert len(steps) == 3
    before = [modulation.clone() for modulation in steps[1]]
    with torch.no_grad():
        plain = fused_flow_blocks(x, y[1], *weights, **keywords(head))
        exact = fused_flow_blocks(x.double(), y[1].double(), *tensors_of(head, torch.float64)[0], **keywords(head))
    for name in ("eager", "triton"):
        ours = modulated(head, x, steps[1], weights, name)
        assert ours.dtype == dtype
        within_twice(ours, plain, exact, floor=2e-6)
        assert torch.equal(modulated(head, x, steps[1], weights, name), ours)
    assert all(map(torch.equal, steps[1], before))


def test_the_last_condition_serves_the_rows_behind_it():
    head = make_head()
    weights, _ = tensors_of(head)
    _, y, steps = made_before(head, weights, rows=8)
    with torch.no_grad():
        some = flow_head.ModulatedBlocks(*weights, head.form, y, 8).modulations(y[:, :6])
    for all_rows, expanded in zip(steps, some, strict=True):
        for modulation, theirs in zip(expanded, all_rows, strict=True):
            assert torch.allclose(modulation[:6], theirs[:6], atol=1e-5)
            assert torch.equal(modulation[6:], modulation[5:6].expand(2, -1))


@pytest.mark.parametrize("name", ["canonical", "SphereAR", "no final modulation"])
def test_the_registered_op_of_modulations_made_before(name):
    head = make_head(**OPTIONS[name])
    weights, _ = tensors_of(head)
    x, _, steps = made_before(head, weights, rows=5)
    tensors = [None if t is None else t.detach() for block in weights[0] for affine in block for t in affine]
    how = (len(weights[0]) // len(weights[1]), *head.form)
    torch.library.opcheck(torch.ops.uniflow_kernels.modulated_flow_blocks.default, (x, list(steps[0]), tensors, *how))


def test_either_path_goes_on_from_what_the_other_has_kept(within_twice):
    """As in a compiled graph, whose passes choose for themselves."""
    head = make_head(40, depth=2)
    exact_weights, exact_every = tensors_of(head, torch.float64)
    exact = run(fused_flow_blocks, *inputs((9,), (9,), 40, torch.float64), exact_weights, exact_every)
    weights, every = tensors_of(head)
    plain = run(fused_flow_blocks, *inputs((9,), (9,), 40), weights, every)
    flat = [t for pair in in_order(*weights) for t in pair]
    x, y = inputs((9,), (9,), 40)
    a, ops = torch.nn.functional.silu(y).detach(), torch.ops.uniflow_kernels
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for keep, first, second in (("all", *KERNELS), ("inputs", *KERNELS), ("all", *KERNELS[::-1])):
        how = 2, 1, *head.form, keep
        with torch.no_grad():
            out, kept = ops.flow_blocks(x, a, flat, *how, first)
            dx, da, found = ops.flow_blocks_backward(cotangent, x, a, flat, kept, *how, True, second)
        (dy,) = torch.autograd.grad(torch.nn.functional.silu(y), y, da)
        gradients = dict(zip((id(t) for t in flat), found, strict=True))
        for triple in zip([out, dx, dy, *(gradients[id(t)] for t in every)], plain, exact, strict=True):
            within_twice(*triple, floor=2e-6)


@paths
def test_norms_whose_weights_do_not_lie_side_by_side(within_twice, path):
    head = make_head(24, depth=2)
    (blocks, modulations, final), every = tensors_of(head)

    def apart(vector):
        return torch.stack([vector, torch.full_like(vector, torch.nan)], 1)[:, 0]

    strided = [block._replace(norm=Affine(*map(apart, block.norm))) for block in blocks]
    assert strided[0].norm.weight.stride() == (2,)
    x, y = inputs((5,), (5,), 24)
    with backend("triton"):
        ours = run(fused_flow_blocks, x, y, (strided, modulations, final), every, path=path)
        expected = run(fused_flow_blocks, x, y, (blocks, modulations, final), every, path=path)
    assert all(map(torch.equal, ours, expected))


def test_why_there_are_no_products(monkeypatch):
    """A path asked for by name says why it cannot serve; where it was only preferred, the other one does."""

    def reason(head, x, y, weights=None):
        weights = tensors_of(head)[0] if weights is None else weights
        with backend("triton"):
            with pytest.raises(ValueError, match=r"^flow_head: path 'products' cannot") as no:
                fused_flow_blocks(x, y, *weights, **keywords(head), path="products")
            by_rows = fused_flow_blocks(x, y, *weights, **keywords(head), path="rows")
            with monkeypatch.context() as preferred:
                preferred.setattr("uniflow_kernels.ops.flow_choice._order", lambda _: ("products", "rows"))
                assert torch.equal(fused_flow_blocks(x, y, *weights, **keywords(head)), by_rows)
        return str(no.value).partition(": path 'products' cannot serve this input: ")[2]

    head = make_head(depth=2)
    blocks, modulations, final = tensors_of(head)[0]
    assert reason(head, *inputs(conditions=(1,))) == "rows share a condition"
    assert reason(make_head(depth=2, modulation_groups=1), *inputs()) == "blocks share a modulation"
    turned = final._replace(weight=final.weight.detach().t().contiguous().t())
    assert "do not follow each other" in reason(head, *inputs(), (blocks, modulations, turned))
    monkeypatch.setitem(
        products.ARCHITECTURES,
        0,
        products.ARCHITECTURES[90]._replace(dtypes=(torch.float16, torch.float32)),
    )
    assert reason(make_head(66, depth=1), *inputs(width=66)).startswith("TMA takes rows that begin at")
    assert reason(make_head(depth=1, hidden=41), *inputs()).startswith("TMA takes rows that begin at")
    x, y = inputs()
    assert reason(head, torch.cat([x.flatten(), x[0]])[1 : 1 + x.numel()].view(x.shape), y).startswith("TMA takes")
    assert reason(head, x[:1].detach().expand(19, 64), y) == "TMA takes rows that do not overlap"
    monkeypatch.setitem(products.ARCHITECTURES, 0, products.ARCHITECTURES[80])
    assert "not torch.float32" in reason(head, x, y)
    monkeypatch.delitem(products.ARCHITECTURES, 0)
    assert "no tiles for compute capability" in reason(head, x, y)


@triton.jit
def place_kernel(places_p, rows, columns: tl.constexpr, height: tl.constexpr, width: tl.constexpr):
    row, col = products.place(rows, columns, height, width)
    tl.store(places_p + 2 * tl.program_id(0), row)
    tl.store(places_p + 2 * tl.program_id(0) + 1, col)


@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (256, 96), (290, 70)])
def test_every_tile_is_made_once(rows, columns):
    """In groups of eight rows of tiles, of which the last may have fewer."""
    tiles = [[row, column] for row in range(0, rows, 16) for column in range(0, columns, 32)]
    places = torch.empty(len(tiles), 2, dtype=torch.int32)
    place_kernel[(len(tiles),)](places, rows, columns, height=16, width=32)
    assert sorted(places.tolist()) == tiles


def test_moments_of_rows_far_from_zero(within_twice):
    """Sums of squares are never subtracted: a mean a thousand times the spread costs no digits."""
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)) + 1000
    moments = products.moments(x, rms=False).values[0]
    exact = torch.stack([x.double().mean(1), x.double().var(1, unbiased=False) * 100])
    plain = torch.stack([x.mean(1), x.var(1, unbiased=False) * 100])
    for triple in zip(moments, plain, exact, strict=True):
        within_twice(*triple, floor=1e-6)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [torch.nn.parallel.DistributedDataParallel, fully_shard])
def test_distributed(process_group, wrap, monkeypatch):
    head = make_head(depth=2)
    data = torch.randn(9, 24), torch.rand(9), torch.randn(9, 40)
    launches = []
    forward = Pass.forward
    monkeypatch.setattr(Pass, "forward", lambda self, path: launches.append(self) or forward(self, path))
    with backend("triton"):
        out, *gradients = module_results(head, *data)
        wrapped = wrap(head)
        wrapped_out = wrapped(*data)
        wrapped_out.square().sum().backward()
    assert len(launches) == 2
    assert torch.equal(wrapped_out, out)
    for parameter, gradient in zip(wrapped.parameters(), gradients, strict=True):
        found = parameter.grad
        assert torch.equal(found.full_tensor() if hasattr(found, "full_tensor") else found, gradient)


def test_the_interpreter_rounds_as_a_gpu_does():
    """Tests in bfloat16 mean nothing without it (see tests/conftest.py)."""
    from uniflow_kernels.triton_kernels.activation import activation

    p = torch.randn(8, 64).bfloat16()
    assert torch.equal(activation(p, 64), torch.nn.functional.silu(p.float()).bfloat16())


def test_explain():
    head = make_head(depth=2)
    few = "" if cpu_kernels.why_not_built() else "the CPU part, up to 8 rows without gradients; else "
    assert head.explain() == f"flow_head: {few}plain PyTorch; Triton: it runs on CUDA, not on cpu"
    with backend("triton"):
        assert head.explain() == "flow_head: Triton row kernels, cuBLAS products; unmeasured on this GPU"
        head.res_blocks[0].register_forward_hook(lambda *_: None)
        assert "given a hook" in head.explain()
        assert "not torch.float64" in head.double().explain()


def test_blocks_that_share_their_tensors(within_twice):
    (blocks, modulations, final), every = tensors_of(make_head(depth=1))
    (exact_blocks, exact_modulations, exact_final), exact_every = tensors_of(make_head(depth=1), torch.float64)
    x, y = inputs()
    with backend("triton"):
        ours = run(fused_flow_blocks, x, y, (2 * blocks, 2 * modulations, final), every)
    plain = run(fused_flow_blocks, x, y, (2 * blocks, 2 * modulations, final), every)
    exact_weights = 2 * exact_blocks, 2 * exact_modulations, exact_final
    exact = run(fused_flow_blocks, *inputs(dtype=torch.float64), exact_weights, exact_every)
    for results in zip(ours, plain, exact, strict=True):
        within_twice(*results, floor=2e-6)

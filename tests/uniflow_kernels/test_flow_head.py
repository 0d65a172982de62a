"""The flow head against its plain definition in float64: numbers, gradients, broadcasting, compilation."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from tests.conftest import check_reset, derivative_error, randomize
from tests.live_bytes import LiveBytes
from uniflow_kernels import FlowHead, backend
from uniflow_kernels.torch_private import children_of, replica_of


def plain_head(p, x, t, c):
    """The release's SimpleMLPAdaLN, row by row and nothing shared; p is a state_dict."""

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, weight=1.0, bias=0.0):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias

    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t.float()[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)
    y = linear("time_embed.mlp.2", F.silu(linear("time_embed.mlp.0", features))) + linear("cond_embed", c)
    x = linear("input_proj", x)
    for i in range(sum(name.endswith("in_ln.weight") for name in p)):
        block = f"res_blocks.{i}"
        shift, scale, gate = linear(f"{block}.adaLN_modulation.1", F.silu(y)).chunk(3, dim=-1)
        h = norm(x, p[f"{block}.in_ln.weight"], p[f"{block}.in_ln.bias"]) * (1 + scale) + shift
        x = x + gate * linear(f"{block}.mlp.2", F.silu(linear(f"{block}.mlp.0", h)))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(y)).chunk(2, dim=-1)
    return linear("final_layer.linear", norm(x) * (1 + scale) + shift)


def make_head(width=64, rows=24, z=40, depth=3):
    return randomize(FlowHead(rows, width, rows, z, depth))


def make_inputs(m=37, rows=24, z=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, rows, generator=generator).to(dtype)
    c = torch.randn(m, z, generator=generator).to(dtype)
    return x, 1000 * torch.rand(m, generator=generator), c


def state(head, dtype):
    return {name: tensor.detach().to(dtype) for name, tensor in head.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 37, 256])
def test_forward(within_twice, dtype, m):
    head = make_head().to(dtype)
    x, t, c = make_inputs(m, dtype=dtype)
    exact = plain_head(state(head, torch.float64), x.double(), t, c.double())
    plain = plain_head(state(head, dtype), x, t, c)
    within_twice(head(x, t, c), plain, exact, floor=1e-6)


def test_gradients(within_twice):
    head = make_head()
    inputs = make_inputs()

    def gradients(function, parameters, dtype):
        x, t, c = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        out = function(x, t, c)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        return torch.autograd.grad((out * weight).sum(), [x, c, *parameters])

    ours = gradients(head, list(head.parameters()), torch.float32)
    names = [name for name, _ in head.named_parameters()]
    results = []
    for dtype in (torch.float32, torch.float64):
        p = {name: tensor.requires_grad_() for name, tensor in state(head, dtype).items()}
        results.append(gradients(lambda x, t, c, p=p: plain_head(p, x, t, c), [p[name] for name in names], dtype))
    for mine, plain, exact in zip(ours, *results, strict=True):
        within_twice(mine, plain, exact, floor=1e-5)


@pytest.mark.parametrize("t", [250.0, torch.tensor(250.0), torch.tensor([250.0])])
def test_one_t_for_all_rows(t):
    head = make_head()
    x, _, c = make_inputs()
    assert torch.allclose(head(x, t, c), head(x, torch.full((37,), 250.0), c), atol=1e-5)


def test_one_condition_for_all_rows():
    head = make_head()
    x, t, c = make_inputs()
    one = c[:1]
    assert torch.allclose(head(x, 3.0, one), head(x, 3.0, one.expand(37, -1)), atol=1e-5)
    assert torch.allclose(head(x, t, one), head(x, t, one.expand(37, -1)), atol=1e-5)


def count_products(head, *inputs):
    """Multiplications with a weight: rows x weight elements, summed over all linear layers."""
    counts = []
    hooks = [
        module.register_forward_hook(
            lambda m, args, out: counts.append(args[0].numel() // args[0].shape[-1] * m.weight.numel())
        )
        for module in head.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    head(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def test_what_is_the_same_for_all_rows_is_computed_once():
    head = make_head(width=64, rows=24, z=40, depth=3)
    x, t, c = make_inputs(100)
    time, cond = 256 * 64 + 64 * 64, 40 * 64
    modulations, rest = 3 * 3 * 64 * 64 + 2 * 64 * 64, 24 * 64 + 3 * 2 * 64 * 64 + 64 * 24
    assert count_products(head, x, t, c) == 100 * (time + cond + modulations + rest)
    assert count_products(head, x, 5.0, c) == time + 100 * (cond + modulations + rest)
    assert count_products(head, x, 5.0, c[:1]) == time + cond + modulations + 100 * rest


OPTIONS = [
    {},
    {"norm": "rms", "mlp": "swiglu", "bias": False},
    {"modulation_order": "scale-shift-gate", "modulation_groups": 2},
    {"final_modulation": False},
]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_several_conditions_at_the_same_x(options, gradients):
    head = randomize(FlowHead(24, 64, 24, 40, 4, **options))
    x, t, c = make_inputs()
    ys = [head.time_embed(t) + head.cond_embed(c), head.time_embed(t[:1]) + head.cond_embed(0 * c[:1])]
    with torch.set_grad_enabled(gradients):
        together = head.from_embeddings(x, ys)
    assert len(together) == 2
    for out, y in zip(together, ys, strict=True):
        assert out.requires_grad == gradients
        assert torch.allclose(out, head.from_embedding(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_hooks_fire_once_for_each_module(options):
    """On all modules at once: those that are called are those that there are."""
    head, calls = randomize(FlowHead(24, 64, 24, 40, 4, **options)), []
    for name, module in head.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
    expected = sorted(name for name, _ in head.named_modules() if name != "res_blocks")  # a list is not called
    head(*make_inputs())
    assert sorted(calls) == expected


@torch.no_grad()
def test_what_a_hook_keeps_is_not_written_over():
    """Where nothing is recorded a head writes over what nobody else has; a hook's outputs are somebody's."""
    head, kept = make_head(), []
    for module in head.modules():
        module.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    head(*make_inputs())
    assert kept
    assert all(torch.equal(out, then) for out, then in kept)


@pytest.mark.parametrize("options", [options for options in OPTIONS if "mlp" not in options])
def test_what_is_not_recorded_is_written_over(options):
    """The same bits in the memory of nine rows of the width: three are modulations."""
    head = randomize(FlowHead(24, 256, 24, 40, 4, **options))
    x, t, c = make_inputs(512)
    with backend("eager"):
        with torch.no_grad(), LiveBytes() as live:
            out = head(x, t, c)
        assert torch.equal(out, head(x, t, c))
    assert live.peak < 9.5 * 512 * 256 * 4


def test_hooks_on_all_modules_fire():
    head, calls = make_head(), []
    handle = register_module_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    try:
        head(*make_inputs())
    finally:
        handle.remove()
    assert calls.count("FlowBlock") == 3
    assert calls.count("FinalLayer") == calls.count("FlowHead") == 1


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_parameter(head):
    head.res_blocks[1].mlp[0].weight = nn.Parameter(2 * head.res_blocks[1].mlp[0].weight.detach())


def other_tensor_assigned(head):
    head.load_state_dict({name: 2 * tensor for name, tensor in head.state_dict().items()}, assign=True)


def changed_in_place(head):
    head.res_blocks[2].in_ln.weight.data.mul_(2)


def no_bias(head):
    head.final_layer.adaLN_modulation[1].bias = None


def other_layer(head):
    head.res_blocks[0].mlp[2] = nn.Linear(64, 64)


def other_activation(head):
    head.res_blocks[0].mlp[1] = nn.Tanh()


def other_class(head):
    head.res_blocks[2].mlp[0].__class__ = Doubled


def other_blocks(head):
    head.res_blocks = make_head(depth=2).res_blocks


def one_block_less(head):
    del head.res_blocks[1]


def other_final_layer(head):
    head.final_layer = make_head(rows=24).final_layer
    head.final_layer.linear.weight.data.mul_(2)


def other_eps(head):
    head.res_blocks[1].in_ln.eps = 0.5


def forward_put_on(head):
    head.res_blocks[1].mlp[1].forward = torch.tanh


def hooked(head):
    head.res_blocks[1].mlp.register_forward_hook(lambda module, inputs, out: 2 * out)


def hooked_before(head):
    head.final_layer.norm_final.register_forward_pre_hook(lambda module, inputs: (inputs[0] ** 2,))


def parametrized(head):
    nn.utils.parametrize.register_parametrization(head.res_blocks[0].mlp[0], "weight", nn.Softplus())


CHANGES = [
    other_parameter,
    other_tensor_assigned,
    changed_in_place,
    no_bias,
    other_layer,
    other_activation,
    other_class,
    other_blocks,
    one_block_less,
    other_final_layer,
    other_eps,
    forward_put_on,
    hooked,
    hooked_before,
    parametrized,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_change_after_a_call_is_seen(change, gradients):
    """What the fused op is given is kept; a copy finds it anew, and the modules themselves know nothing of it."""
    head, inputs = make_head(), make_inputs()
    with torch.set_grad_enabled(gradients):
        before = head(*inputs)
        assert head._found._known is not None
        change(head)
        after = head(*inputs)
        x, t, c = inputs
        y = head.time_embed(t) + head.cond_embed(c)
        expected = head._by_modules(head.input_proj(x), y, again=False)
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        assert torch.allclose(after, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(after, copy.deepcopy(head)(*inputs))


def test_a_backward_hook_after_a_call_fires():
    head, inputs, fired = make_head(), make_inputs(), []
    head(*inputs).sum().backward()
    head.res_blocks[1].register_full_backward_hook(lambda *_: fired.append(1))
    head(*inputs).sum().backward()
    assert fired == [1]


def test_what_was_found_is_of_no_other_head():
    """Copies, shallow or deep, pickles, replicas and calls with other parameters."""
    head, inputs = make_head(), make_inputs()
    expected = head(*inputs)
    shallow, deep, replica = copy.copy(head), copy.deepcopy(head), replica_of(head)
    for other in (shallow, deep, pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(*inputs), expected)
    doubled = {name: 2 * p for name, p in head.named_parameters()}
    assert not torch.allclose(functional_call(head, doubled, inputs), expected)
    deep.res_blocks[0].mlp[0].weight.data.zero_()
    assert not torch.equal(deep(*inputs), expected)
    children_of(replica)["res_blocks"] = deep.res_blocks  # a replica shares the attributes that are no modules
    assert not torch.equal(
        replica._by_modules(head.input_proj(inputs[0]), head.cond_embed(inputs[2]), again=False),
        head._by_modules(head.input_proj(inputs[0]), head.cond_embed(inputs[2]), again=False),
    )
    assert replica._found(replica)[0][0].up.weight is deep.res_blocks[0].mlp[0].weight
    assert torch.equal(head(*inputs), expected)


def test_no_rows():
    head = make_head()
    x, t, c = make_inputs(0)
    assert head(x, t, c).shape == (0, 24)


def test_strided_inputs():
    head = make_head()
    x, t, c = make_inputs(20)
    expected = head(x, t, c)
    wide = torch.zeros(20, 48)
    wide[:, ::2] = x
    assert torch.equal(head(wide[:, ::2], t, c), expected)
    assert torch.allclose(head(x.T.contiguous().T, t, c.T.contiguous().T), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("x", (torch.zeros(5, 23), torch.zeros(5), torch.zeros(5, 40))),
        ("x", (torch.zeros(1, 5, 24), torch.zeros(5), torch.zeros(5, 40))),
        ("t", (torch.zeros(5, 24), torch.zeros(4), torch.zeros(5, 40))),
        ("c", (torch.zeros(5, 24), torch.zeros(5), torch.zeros(4, 40))),
        ("c", (torch.zeros(5, 24), torch.zeros(5), torch.zeros(5, 41))),
    ],
)
def test_wrong_shapes_name_the_argument(name, inputs):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make_head()(*inputs)


@pytest.mark.parametrize(
    ("name", "change"),
    [("x", torch.Tensor.cfloat), ("t", torch.Tensor.cfloat), ("c", torch.Tensor.cfloat), ("x", torch.Tensor.int)],
)
def test_dtypes_that_are_no_numbers_for_it_name_the_argument(name, change):
    inputs = dict(zip("xtc", make_inputs(5), strict=True))
    inputs[name] = change(inputs[name])
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        make_head()(**inputs)


@pytest.mark.parametrize("name", ["x", "c"])
@pytest.mark.parametrize(("weights", "given"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_another_dtype_than_the_weights_names_the_argument(name, weights, given):
    inputs = dict(zip("xtc", make_inputs(5, dtype=weights), strict=True))
    inputs[name] = inputs[name].to(given)
    head = make_head().to(weights)
    with pytest.raises(TypeError, match=f"^{name}: expected {weights}, the dtype of the head's weights, got {given}"):
        head(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(**inputs).dtype == torch.bfloat16


class Int8Linear(torch.nn.Module):
    """A linear layer with an int8 weight and a scale a row, as weight-only quantization has it."""

    def __init__(self, layer):
        super().__init__()
        exact = layer.weight.detach().float()
        scale = exact.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (exact / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class PackedLinear(torch.nn.Module):
    """One whose weight is a method, as in torch's own quantized layers."""

    def __init__(self, layer):
        super().__init__()
        self.inner = Int8Linear(layer)

    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("kind", "bias", "dtype"),
    [
        *[(Int8Linear, True, torch.float32), (Int8Linear, True, torch.bfloat16), (Int8Linear, False, torch.float32)],
        (PackedLinear, True, torch.float32),
    ],
)
def test_quantized_layers(kind, bias, dtype):
    """The sinusoids were rounded to the weight's dtype, int8: to -1, 0 and 1."""
    head = randomize(FlowHead(24, 64, 24, 40, 3, bias=bias)).to(dtype)
    x, t, c = make_inputs(dtype=dtype)
    expected = head(x, t, c).float()
    for module in list(head.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(module, name, kind(layer))
    error = (head(x, t, c).float() - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.05
    assert head.explain().startswith("flow_head: plain PyTorch")


def test_starts_at_zero_velocity():
    head = FlowHead(24, 64, 24, 40, 2)
    assert head(*make_inputs()).abs().max() == 0


def test_gradient_checkpointing_changes_no_number():
    head = make_head()
    inputs = make_inputs()
    results = []
    for enabled in (False, True):
        head.grad_checkpointing = enabled
        out = head(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(head.parameters()))])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def test_autocast_keeps_the_residual_in_half_precision(within_twice):
    head = make_head()
    x, t, c = make_inputs()
    exact = plain_head(state(head, torch.float64), x.double(), t, c.double())
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = head(x, t, c), plain_head(state(head, torch.float32), x, t, c)
    assert out.dtype == torch.bfloat16
    within_twice(out, plain, exact)


def test_compiles_whole_without_recompiling_for_another_number_of_rows():
    head = make_head()
    compiled = torch.compile(head, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (37, 5, 64):
            inputs = make_inputs(m)
            assert torch.allclose(compiled(*inputs), head(*inputs), atol=1e-6)


def test_copies_pickles_and_functional_calls():
    head = make_head()
    inputs = make_inputs()
    expected = head(*inputs)
    assert torch.equal(copy.deepcopy(head)(*inputs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(head))(*inputs), expected)
    assert torch.equal(functional_call(head, dict(head.named_parameters()), inputs), expected)


def by_func(function, x, dx):
    return torch.func.jvp(function, (x,), (dx,))[1]


def by_dual_numbers(function, x, dx):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, dx))).tangent


@pytest.mark.parametrize("derivative", [by_func, by_dual_numbers])
@pytest.mark.parametrize("options", [{}, {"norm": "rms", "mlp": "swiglu"}, {"recompute": "block"}, {"hooks": True}])
def test_gradients_of_forward_mode_derivatives(derivative, options):
    """Against finite differences: torch's own layer norm gives wrong ones."""
    hooks = options.get("hooks")
    head = randomize(FlowHead(4, 8, 4, 6, 2, **{} if hooks else options)).double()
    if hooks:
        for module in (head.res_blocks[0], head.res_blocks[1].in_ln, head.final_layer.norm_final):
            module.register_forward_hook(lambda *_: None)
    x, dx, c = (torch.randn(3, size, dtype=torch.float64) for size in (4, 4, 6))
    t, parameters = torch.rand(3), list(head.parameters())

    def loss():
        tangent = derivative(lambda x: head(x, t, c), x, dx)
        return (tangent * torch.arange(12.0).view(3, 4)).sum()

    assert derivative_error(loss, [x.requires_grad_(), *parameters]) < 1e-6


def test_dual_numbers_are_not_for_the_kernels():
    head = make_head()
    x, t, c = make_inputs(3)
    with backend("triton"), pytest.raises(ValueError, match="nor for dual numbers"):
        by_dual_numbers(lambda x: head(x, t, c), x, x)


def test_runs_are_equal_to_the_bit():
    head = make_head()
    inputs = make_inputs()
    first = head(*inputs)
    assert all(torch.equal(head(*inputs), first) for _ in range(20))


@pytest.mark.parametrize("trained", [True, False])
def test_rows_with_columns_of_zeros_behind(trained):
    """As `interpolate(columns=...)` writes them: the same numbers and gradients, and a changed weight is seen."""
    head = make_head(rows=21)
    assert head.padded_columns(torch.float32) == head.padded_columns(torch.bfloat16) == 24
    x, t, c = make_inputs(rows=21)
    padded = F.pad(x, (0, 3))
    for _ in range(2):
        with torch.set_grad_enabled(trained):
            ours, plain = head(padded, t, c), head(x, t, c)
        assert ours.shape == (x.shape[0], 24)
        assert not ours[:, 21:].any()
        torch.testing.assert_close(ours[:, :21], plain)
        last = head.final_layer.linear
        if trained:
            weights = head.input_proj.weight, last.weight, last.bias
            found = [torch.autograd.grad(out.square().sum(), weights) for out in (ours, plain)]
            for pair in zip(*found, strict=True):
                torch.testing.assert_close(*pair)
        with torch.no_grad():
            head.input_proj.weight.mul_(2)
            last.weight.mul_(0.5)
            last.bias.add_(1)
    with pytest.raises(ValueError, match=r"x: expected shape \[M, 21\]"):
        head(F.pad(x, (0, 2)), t, c)


def test_hooks_see_rows_without_the_columns_behind():
    head = make_head(rows=21)
    x, t, c = make_inputs(rows=21)
    seen = []
    head.input_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    head.final_layer.linear.register_forward_hook(lambda *values: seen.append(values[-1].shape))
    torch.testing.assert_close(head(F.pad(x, (0, 3)), t, c), F.pad(head(x, t, c), (0, 3)))
    assert seen == [x.shape] * 4


@pytest.mark.parametrize("options", OPTIONS)
def test_reset_parameters_leaves_nothing_as_it_was(options):
    check_reset(lambda: FlowHead(6, 32, 6, 20, 4, **options))

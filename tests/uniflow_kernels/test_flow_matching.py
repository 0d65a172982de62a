import copy
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend, flow_matching_loss, patchify, seeded_noise
from uniflow_kernels.modules import chunks, flow_matching
from uniflow_kernels.torch_private import TorchDispatchMode

PATCH, GRID, WIDTH, Z = 4, (2, 3), 32, 24
NORMALIZATION = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def make_head(dtype=torch.float32, depth=2, **options):
    return randomize(FlowHead(3 * PATCH**2, WIDTH, 3 * PATCH**2, Z, depth, **options)).to(dtype)


def make_batch(batch=3, grid=GRID, per_token=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1]
    condition, noise = (torch.randn(batch, tokens, width, generator=generator) for width in (Z, 3 * PATCH**2))
    images = torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=generator)
    t = torch.rand(batch, tokens, generator=generator)
    return condition.to(dtype).requires_grad_(), images, t if per_token else t[:, 0], noise


def results(head, condition, images, t, noise, chunk_tokens=None, function=flow_matching_loss, incoming=1.0, **options):
    """Loss and gradients of condition and parameters."""
    options = {"noise": noise, "time_scale": 1000.0, **options}
    loss = function(head, condition, images, t, PATCH, **options, chunk_tokens=chunk_tokens)
    return [loss.detach(), *torch.autograd.grad(incoming * loss, [condition, *head.parameters()])]


def exactly(head, condition, images, t, noise, weights=1.0, mask=None):
    """The same in float64, by the formula."""
    head = copy.deepcopy(head).double()
    condition = condition.detach().double().requires_grad_()
    x1, x0 = patchify(images.double(), PATCH), noise.double()
    s = (t if t.ndim == 2 else t[:, None]).double().expand(condition.shape[:2])
    x_t = s[..., None] * x1 + (1 - s[..., None]) * x0
    velocity = head(x_t.flatten(0, 1), 1000 * s.flatten(), condition.flatten(0, 1)).unflatten(0, s.shape)
    losses = (velocity - (x1 - x0)).square().mean(-1) * weights
    loss = losses.mean() if mask is None else (losses * mask).sum() / mask.sum()
    return [loss.detach(), *torch.autograd.grad(loss, [condition, *head.parameters()])]


def same(found, expected, tolerance=2e-6):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 6, 13, 100])
@pytest.mark.parametrize("per_token", [True, False])
def test_against_float64(within_twice, chunk_tokens, per_token):
    """Chunks of a line of patches, of an image, of two images and of all."""
    head, batch = make_head(), make_batch(per_token=per_token)
    ours, plain = results(head, *batch, chunk_tokens), results(head, *batch)
    for each in zip(ours, plain, exactly(head, *batch), strict=True):
        within_twice(*each)


def test_weights_mask_and_normalisation(within_twice):
    head, (condition, _, t, noise) = make_head(), make_batch()
    images = torch.randint(0, 256, (3, 8, 12, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    weights, mask = torch.rand(3, 6), torch.rand(3, 6) < 0.6
    mean, std = (torch.tensor(values).double()[:, None, None] for values in NORMALIZATION.values())
    exact = exactly(head, condition, (images.double() / 255 - mean) / std, t, noise, weights, mask)
    options = {"weights": weights, "mask": mask, **NORMALIZATION}
    ours = results(head, condition, images, t, noise, 6, **options)
    plain = results(head, condition, images, t, noise, **options)
    for each in zip(ours, plain, exact, strict=True):
        within_twice(*each)
    nothing = results(head, condition, images, t, noise, 6, mask=torch.zeros(3, 6, dtype=torch.bool))
    assert not any(x.any() for x in nothing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(within_twice, dtype, autocast):
    head, batch = (
        make_head(torch.float32 if autocast else dtype),
        make_batch(dtype=torch.float32 if autocast else dtype),
    )
    with torch.autocast("cpu", dtype, enabled=autocast):
        ours, plain = results(head, *batch, 6), results(head, *batch)
    for ours_, plain_, exact in zip(ours, plain, exactly(head, *batch), strict=True):
        assert ours_.dtype == plain_.dtype
        within_twice(ours_, plain_, exact, floor=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize(("autocast", "columns"), [(False, 28), (True, 32)])
def test_rows_of_whole_lines_change_nothing(monkeypatch, chunk_tokens, autocast, columns):
    """As on a GPU: x_t and the velocity are as long as products want them, in the products' dtype."""
    head = randomize(FlowHead(27, WIDTH, 27, Z, 2))
    images, t, c = torch.randn(2, 3, 6, 9), torch.rand(2, 6), torch.randn(2, 6, Z, requires_grad=True)
    seen, real = [], flow_matching.velocity_loss_from

    def watched(source, velocity, *rest):
        seen.append(velocity.shape[-1])
        return real(source, velocity, *rest)

    def found():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = flow_matching_loss(head, c, images, t, 3, seed=1, chunk_tokens=chunk_tokens)
        return [loss.detach(), *torch.autograd.grad(loss, [c, *head.parameters()])]

    monkeypatch.setattr(flow_matching, "velocity_loss_from", watched)
    plain = found()
    monkeypatch.setattr(flow_matching, "_wants_whole_lines", lambda images: True)
    same(found(), plain, 2e-2 if autocast else 2e-6)
    assert seen == [27] * (len(seen) // 2) + [columns] * (len(seen) // 2)
    monkeypatch.setattr(FlowHead, "forward", lambda self, x, t, c: FlowHead.from_embedding(
        self, x[:, :27], self.time_embed(t) + self.cond_embed(c)
    ))  # fmt: skip
    same(found(), plain, 2e-2 if autocast else 2e-6)
    assert seen[-1] == 27


class Counted(TorchDispatchMode):
    """How often each operation is called, and how often one brings a matrix of a weight's shape to another dtype."""

    def __init__(self, head):
        super().__init__()
        self.shapes = {tuple(p.shape) for p in head.parameters() if p.ndim == 2}
        self.calls, self.casts = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        self.casts += name == "_to_copy" and tuple(arguments[0].shape) in self.shapes
        return function(*arguments, **(keywords or {}))


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("frozen", [None, "input_proj.weight"])
def test_weights_are_cast_once_a_step(monkeypatch, frozen):
    """To the bits of what autocast casts in every chunk, and back; whoever looks meanwhile finds the head as it is."""
    head, batch = make_head(), make_batch(4, (3, 3))
    if frozen is not None:
        head.get_parameter(frozen).requires_grad_(False)
    wanted, own, loss_of_chunk = [p for p in head.parameters() if p.requires_grad], list(head.parameters()), []

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_matching_loss(head, *batch[:3], PATCH, batch[3], time_scale=1000.0, chunk_tokens=9)
        return [loss.detach(), *torch.autograd.grad(loss, [batch[0], *wanted])]

    real = flow_matching._Batch.loss

    def watched(*given):
        loss_of_chunk.append(1)
        assert all(mine is before for mine, before in zip(head.parameters(), own, strict=True))
        return real(*given)

    monkeypatch.setattr(flow_matching._Batch, "loss", watched)
    with Counted(head) as once:
        found = step()
    assert len(loss_of_chunk) == 4
    assert once.casts == sum(p.ndim == 2 for p in own)
    monkeypatch.setattr(chunks, "cast_once", lambda *_: None)
    with Counted(head) as each_time:
        expected = step()
    assert each_time.casts > 3 * once.casts
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class Elsewhere(nn.Module):
    """Computes with a layer that it holds where nobody looks for one."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.layers = layer.weight, (layer,)

    def forward(self, x):
        return self.layers[0](x)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        *((what, "eager") for what in ("forward hook", "backward hook", "own hook", "replaced", "shared")),
        ("shared", "triton"),
    ],
)
def test_what_casting_would_hide_is_left_to_autocast(monkeypatch, what, name):
    head, batch, seen = make_head(), make_batch(), []
    block = head.res_blocks[0]
    if what == "forward hook":
        block.mlp[0].register_forward_hook(lambda module, *_: seen.append(module.weight is block.mlp[0].weight))
    elif what == "backward hook":
        block.register_full_backward_hook(lambda module, *_: seen.append(module is block))
    elif what == "own hook":
        head.register_forward_hook(lambda module, *_: seen.append(module is head))
    elif what == "replaced":
        head.cond_embed = Elsewhere(head.cond_embed)
    else:
        head.res_blocks[1].mlp = block.mlp
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), backend(name):
            found.append(results(head, *batch, 6))
        monkeypatch.setattr(chunks, "cast_once", lambda *_: None)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert all(seen)
    assert len(seen) == (0 if what in ("replaced", "shared") else 6)


def test_gradients_that_share_a_buffer_are_apart(monkeypatch):
    """Of float32 weights under autocast on a GPU: whoever adds to one, or clears it, changes no other."""
    monkeypatch.setattr(chunks, "_launches", lambda _: True)
    head, batch = make_head(), make_batch()
    weights = [p for p in head.parameters() if p.ndim == 2]

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_matching_loss(head, *batch[:3], PATCH, batch[3], chunk_tokens=6)
        loss.backward()
        return [p.grad for p in weights]

    first = step()
    assert len({p.grad.untyped_storage().data_ptr() for p in weights}) == 1
    values = [gradient.clone() for gradient in first]
    assert all(torch.equal(twice, 2 * once) for twice, once in zip(step(), values, strict=True))
    weights[1].grad.zero_()
    assert all(torch.equal(p.grad, 2 * once) for p, once in zip(weights[2:], values[2:], strict=True))
    head.zero_grad()
    again = step()  # while the first are held
    assert all(torch.equal(*pair) for pair in zip(again, values, strict=True))
    assert all(torch.equal(kept, 2 * once) for kept, once in zip(first[2:], values[2:], strict=True))


@pytest.mark.parametrize("launches", [True, False])
def test_sums_of_gradients(monkeypatch, launches):
    """In float32, to the bits of one addition after the other; two operations a chunk where each costs a launch."""
    monkeypatch.setattr(chunks, "_launches", lambda _: launches)
    shapes = {torch.bfloat16: [(3, 5), (), (0, 4), (7,)], torch.float32: [(2, 3)], torch.float64: [(4,)]}
    like = [torch.empty(shape, dtype=dtype) for dtype, each in shapes.items() for shape in each]
    summed_in = [torch.promote_types(p.dtype, torch.float32) for p in like[::-1]]
    expected = [torch.zeros(p.shape, dtype=dtype) for p, dtype in zip(like[::-1], summed_in, strict=True)]
    sums = chunks._Sums(like[::-1])
    for _ in range(3):
        found = [torch.randn(p.shape).to(p.dtype) for p in like[::-1]]
        with Counted(nn.Module()) as counted:
            sums.add(found)
        halves = {"cat": counted.calls.get("cat"), "add_": counted.calls.get("add_")}
        assert halves == ({"cat": 1, "add_": 1} if launches else {"cat": None, "add_": None})
        expected = [total.add_(one) for total, one in zip(expected, found, strict=True)]
    assert [each.dtype for each in sums.each] == summed_in
    assert all(torch.equal(*pair) for pair in zip(sums.each, expected, strict=True))


def test_float16_gradients_do_not_vanish(within_twice):
    """The mean over many tokens makes a token's gradient smaller than float16 can hold; the sum's is not."""
    head, batch = make_head(torch.float16), make_batch(16, (8, 8), dtype=torch.float16)
    ours, exact = results(head, *batch, 256, incoming=2.0**16), exactly(head, *batch)
    assert all(torch.isfinite(x).all() for x in ours)
    for found, expected in zip(ours[1:], exact[1:], strict=True):
        assert (found.double() / 2**16 - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("grid", [(2, 3), (1, 7), (5, 1)])
def test_seeded_noise_is_the_same_in_chunks(grid):
    head = make_head()
    condition, images, t, _ = make_batch(grid=grid)
    tokens = grid[0] * grid[1]
    noise = seeded_noise(3 * tokens, 48, 11, 2).view(3, tokens, 48)
    given = results(head, condition, images, t, noise)
    for chunk_tokens in (1, 4, 7, 14, 100):
        same(results(head, condition, images, t, None, chunk_tokens, seed=11, offset=2), given)


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize(("grid", "chunks"), [((2, 3), (4, 14)), ((5, 1), (1,))])
def test_chunks_of_seeded_noise_are_those_of_the_whole_to_the_bit(grid, chunks):
    """At t = 0 the head sees nothing else."""
    condition, images, t, _ = make_batch(grid=grid)
    options = {"seed": 11, "offset": 2, "first_row": 2**33 + 1}
    head, rows = make_head(), []
    head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    seen = {}
    for chunk_tokens in (None, *chunks):
        rows.clear()
        flow_matching_loss(head, condition, images, 0 * t, PATCH, chunk_tokens=chunk_tokens, **options)
        seen[chunk_tokens] = torch.cat(rows)
        assert torch.equal(seen[chunk_tokens], seen[None])
    expected = seeded_noise(3 * grid[0] * grid[1], 48, 11, 2, first_row=2**33 + 1)
    assert (seen[None] - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "options", [{"recompute": "block"}, {"norm": "rms", "mlp": "swiglu", "bias": False}, {"modulation_groups": 1}]
)
def test_every_kind_of_head(options):
    head, batch = make_head(**options), make_batch()
    same(results(head, *batch, 6), results(head, *batch))


def test_on_the_fused_head():
    head, batch = make_head(), make_batch()
    plain = results(head, *batch)
    with backend("triton"):
        same(results(head, *batch, 6), plain)


def test_any_module_will_do():
    """One with a buffer, shared parameters, one frozen and one that nothing depends on."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(48 + Z, WIDTH), nn.Linear(WIDTH, 48)
            self.again, self.unused = self.down, nn.Parameter(torch.ones(3))
            self.register_buffer("shift", torch.randn(WIDTH))
            self.up.bias.requires_grad_(False)

        def forward(self, x, t, c):
            h = torch.tanh(self.up(torch.cat([x, c], 1)) + self.shift + t[:, None])
            return self.down(h) + self.again(h.square())

    head, (condition, images, t, noise) = Head(), make_batch()
    for chunk_tokens in (None, 6):
        head.zero_grad()
        flow_matching_loss(head, condition, images, t, PATCH, noise, chunk_tokens=chunk_tokens).backward()
        if chunk_tokens is None:
            expected = {name: p.grad for name, p in head.named_parameters()}
    assert head.up.bias.grad is None
    assert not head.unused.grad.any()
    names = ("up.weight", "down.weight", "down.bias")
    same([head.get_parameter(name).grad for name in names], [expected[name] for name in names])


def test_what_wants_no_gradient_gets_none():
    head, (condition, images, t, noise) = make_head(), make_batch()
    full = results(head, condition, images, t, noise, 6)
    arguments = images, t, PATCH, noise
    options = {"time_scale": 1000.0, "chunk_tokens": 6}
    flow_matching_loss(head, condition.detach(), *arguments, **options).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(head.parameters(), full[2:], strict=True))
    head.requires_grad_(False)
    loss = flow_matching_loss(head, condition, *arguments, **options)
    assert torch.equal(torch.autograd.grad(loss, condition)[0], full[1])
    assert not flow_matching_loss(head, condition.detach(), *arguments, **options).requires_grad
    for no_gradient in (torch.no_grad, torch.inference_mode):
        with no_gradient():
            assert torch.allclose(flow_matching_loss(head.requires_grad_(), condition, *arguments, **options), full[0])


def test_hooks_of_parameters_see_one_gradient_a_step():
    head, (condition, images, t, noise) = make_head(), make_batch()
    seen, accumulated = [], []
    head.input_proj.weight.register_hook(lambda g: seen.append(g) or 2 * g)
    head.input_proj.weight.register_post_accumulate_grad_hook(accumulated.append)
    expected = results(make_head(), condition, images, t, noise, 6)
    loss = flow_matching_loss(head, condition, images, t, PATCH, noise, time_scale=1000.0, chunk_tokens=6)
    assert not seen
    assert all(p.grad is None for p in head.parameters())
    loss.backward()
    assert len(seen) == len(accumulated) == 1
    position = [name for name, _ in head.named_parameters()].index("input_proj.weight")
    assert torch.equal(head.input_proj.weight.grad, 2 * expected[2 + position])


def test_gradient_accumulation_and_a_graph_that_is_kept():
    head, (condition, images, t, noise) = make_head(), make_batch()
    expected = results(head, condition, images, t, noise, 6)
    for scale in (1.0, 2.0**16):
        loss = flow_matching_loss(head, condition, images, t, PATCH, noise, time_scale=1000.0, chunk_tokens=6)
        (scale * loss).backward(retain_graph=True)
        (scale * loss).backward()
        found = [condition.grad, *(p.grad for p in head.parameters())]
        same(found, [2 * scale * g for g in expected[1:]])
        condition.grad = None
        head.zero_grad()


def test_the_same_bits_every_time():
    head, batch = make_head(), make_batch()
    first = results(head, *batch, 6)
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, results(head, *batch, 6), strict=True))


@pytest.mark.parametrize("hooked", [False, True])
def test_threads_take_turns_on_a_head(hooked):
    """The second comes while the first is within the head, and must not find, or leave, the first one's stand-ins."""
    head, batch, others = make_head(), make_batch(), make_batch(2)
    if hooked:
        head.input_proj.weight.register_hook(lambda gradient: gradient)
    expected, parameters = [results(head, *given, chunk_tokens=6) for given in (batch, others)], list(head.parameters())
    first_is_in, second_is_in, found = threading.Event(), threading.Event(), {}

    def wait(*_):
        (second_is_in if first_is_in.is_set() else first_is_in).set()
        second_is_in.wait(0.1)

    hook = head.register_forward_pre_hook(wait)

    def work(name, given):
        condition, *others = given
        loss = flow_matching_loss(head, condition, *others[:2], PATCH, others[2], time_scale=1000.0, chunk_tokens=6)
        found[name] = [loss.detach(), *torch.autograd.grad(loss, [condition, *parameters])]

    first = threading.Thread(target=work, args=(0, batch))
    first.start()
    first_is_in.wait()
    work(1, others)
    first.join()
    hook.remove()
    assert all(mine is before for mine, before in zip(head.parameters(), parameters, strict=True))
    for name in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(found[name], expected[name], strict=True))


def test_an_empty_batch():
    head, batch = make_head(), make_batch(0)
    found = results(head, *batch, 6)
    assert all(x.eq(0).all() for x in found)
    assert found[1].shape == batch[0].shape


class Saved:
    """The bytes that autograd holds, counted storage by storage; `most` is the largest number there was at a time.

    Parameters and inputs, which are there anyway, do not count.
    """

    def __init__(self, head):
        self.given = {p.untyped_storage().data_ptr() for p in head.parameters()}
        self.holders, self.now, self.most = {}, 0, 0

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.given:
            return tensor
        box, key = self.Box(tensor), storage.data_ptr()
        if self.holders.setdefault(key, 0) == 0:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        self.holders[key] += 1
        weakref.finalize(box, self.release, key, storage.nbytes())
        return box

    def release(self, key, nbytes):
        self.holders[key] -= 1
        self.now -= nbytes if self.holders[key] == 0 else 0

    def unpack(self, box):
        return box.tensor if isinstance(box, self.Box) else box

    def of(self, head, batch, chunk_tokens):
        """(most bytes at a time, bytes still held when the loss is there)."""
        condition, images, t, noise = make_batch(batch)
        self.given |= {x.untyped_storage().data_ptr() for x in (condition, images, t, noise)}
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            loss = flow_matching_loss(head, condition, images, t, PATCH, noise, chunk_tokens=chunk_tokens)
        held = self.now
        loss.backward()
        return self.most, held


def test_kept_activations_do_not_grow_with_tokens():
    head = make_head(depth=4)
    gradients = sum(p.nbytes for p in head.parameters()) + 4
    most, plain = {}, {}
    for batch in (8, 16, 32):
        most[batch], held = Saved(head).of(head, batch, 4 * 6)
        plain[batch], _ = Saved(head).of(head, batch, None)
        assert held == gradients + batch * 6 * Z * 4  # the gradients, and nothing else
    assert most[8] == most[16] == most[32]
    assert plain[32] > 3.5 * plain[8]
    assert most[32] < 0.6 * plain[8]


def test_registered_op_is_sound():
    from uniflow_kernels.modules.flow_matching import _remember

    head, (condition, images, t, noise) = make_head(depth=1), make_batch()
    batch = (images, t, noise, None, None, None, None, None, 0, 0, 0, PATCH, noise.shape[-1], 1.0)
    arguments = (condition, list(head.parameters()), *batch, 6)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.uniflow_kernels.flow_matching
    torch.library.opcheck(op, (*arguments, _remember(id(head)), True, None), test_utils=tests)


@pytest.mark.slow
def test_compiles_whole_and_once():
    """One node in the graph of what is around it, for any number of tokens; another head is another graph."""
    around = nn.Linear(Z, Z)

    def step(head, condition, images, t, noise):
        with torch.autocast("cpu", torch.bfloat16):
            condition = around(condition).float()
            return 2 * flow_matching_loss(head, condition, images, t, PATCH, noise, chunk_tokens=6)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    head, other = make_head(depth=1), make_head(depth=1, eps=0.5)
    for attempt, (head_, size) in enumerate([(head, 2), (head, 3), (head, 5), (other, 3)]):
        condition, images, t, noise = make_batch(size)
        leaves = [condition, *around.parameters(), *head_.parameters()]
        with torch._dynamo.config.patch(error_on_recompile=0 < attempt < 3):
            found = torch.autograd.grad(compiled(head_, condition, images, t, noise), leaves)
        expected = torch.autograd.grad(step(head_, condition, images, t, noise), leaves)
        assert all(torch.equal(*each) for each in zip(found, expected, strict=True))


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def full(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_distributed(process_group, wrap):
    head, (condition, images, t, noise) = make_head(), make_batch()
    expected = results(head, condition, images, t, noise, 6)
    wrapped = wrap(copy.deepcopy(head))
    for steps in (1, 2):  # the second time the gradients accumulate
        loss = flow_matching_loss(wrapped, condition, images, t, PATCH, noise, time_scale=1000.0, chunk_tokens=6)
        loss.backward()
        found = [condition.grad, *(full(p.grad) for p in wrapped.parameters())]
        same([loss.detach(), *found], [expected[0], *(steps * g for g in expected[1:])])
    with torch.no_grad():
        again = flow_matching_loss(wrapped, condition, images, t, PATCH, noise, time_scale=1000.0, chunk_tokens=6)
    assert torch.allclose(again, expected[0])


def test_fsdp_in_mixed_precision(process_group):
    head, (condition, images, t, noise) = make_head(), make_batch()
    expected = results(head, condition, images, t, noise)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = fully_shard(copy.deepcopy(head), mp_policy=policy)
    flow_matching_loss(sharded, condition, images, t, PATCH, noise, time_scale=1000.0, chunk_tokens=6).backward()
    found = [condition.grad, *(full(p.grad) for p in sharded.parameters())]
    same(found, expected[1:], 0.1)
    assert found[0].dtype == torch.float32


def test_a_head_sharded_in_parts_is_refused(process_group):
    head, batch = make_head(), make_batch()
    fully_shard(head.res_blocks[0])
    with pytest.raises(ValueError, match=r"^head: its parameter .* is sharded; call fully_shard on the"):
        flow_matching_loss(head, *batch[:3], PATCH, batch[3], chunk_tokens=6)


def test_chunks_of_a_size_that_was_not_said():
    head, calls = make_head(depth=1), []
    head.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    flow_matching_loss(head, *make_batch(5, (32, 32))[:3], PATCH, seed=1)
    assert calls == [4096, 1024]


@pytest.mark.parametrize(
    ("width", "depth", "dtype", "gigabytes", "chunk"),
    [
        (1024, 12, torch.bfloat16, None, 4096),
        *((1024, 12, torch.bfloat16, *each) for each in ((85, 32768), (48, 32768), (42, 16384), (25, 16384))),
        *((1024, 12, torch.bfloat16, *each) for each in ((16, 8192), (8, 4096), (1, 4096))),
        (1024, 12, torch.float32, 85, 16384),
        (2048, 24, torch.bfloat16, 85, 8192),
        (256, 3, torch.float32, 8, 32768),
    ],
)
def test_a_gpus_chunk_is_what_an_eighth_of_it_holds(width, depth, dtype, gigabytes, chunk):
    with torch.device("meta"):
        head = FlowHead(48, width, 48, Z, depth)
    memory = None if gigabytes is None else gigabytes * 10**9
    assert chunks.rows_at_once(head, dtype, memory) == chunk
    if (width, depth) == (1024, 12):
        assert chunks.rows_at_once(nn.Linear(2, 2), dtype, memory) == chunk


def test_what_fits_one_chunk_is_plain_autograd():
    head, (condition, images, t, noise) = make_head(), make_batch()
    condition.requires_grad_()
    found = []
    for chunk_tokens in (3 * 6, None):
        loss = flow_matching_loss(head, condition, images, t, PATCH, noise, chunk_tokens=chunk_tokens)
        found.append(torch.autograd.grad(loss, [condition, *head.parameters()]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"condition": torch.zeros(3, 5, Z)}, ValueError, r"condition: expected shape \(3, 6, 'Z'\)"),
        ({"t": torch.zeros(2)}, ValueError, r"t: expected shape \(3,\) or \(3, 6\), got \(2,\)"),
        ({"noise": None}, ValueError, "noise, seed: expected exactly one"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(3, 6\)"),
        ({"mask": torch.ones(4, 6)}, ValueError, r"mask: expected shape \(3, 6\)"),
        ({"mask": torch.ones(3, 6)}, TypeError, "mask: expected torch.bool"),
        ({"patch_size": 5}, ValueError, "images: height and width"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: expected at least 1, or None"),
        ({"chunk_tokens": "all"}, ValueError, "chunk_tokens: expected at least 1, or None .*, got 'all'"),
        (
            {"t": torch.zeros(3, requires_grad=True), "chunk_tokens": 6},
            ValueError,
            "t: expected constants; chunk_tokens=None",
        ),
    ],
)
def test_wrong_inputs_name_the_argument(changes, error, message):
    condition, images, t, noise = make_batch()
    arguments = {"condition": condition, "images": images, "t": t, "patch_size": PATCH, "noise": noise, **changes}
    with pytest.raises(error, match=f"^{message}"):
        flow_matching_loss(make_head(), **arguments)

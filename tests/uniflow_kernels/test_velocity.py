import pytest
import torch

from uniflow_kernels import interpolate, noise_seed, patchify, seeded_noise, velocity_loss

pytestmark = pytest.mark.usefixtures("on_all_backends")


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 12, generator=generator).to(dtype)
    noise, prediction = (torch.randn(2, 6, 48, generator=generator).to(dtype) for _ in range(2))
    return images, noise, prediction


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_interpolate(within_twice, per_token, dtype, on_all_backends):
    images, noise, _ = inputs(dtype)
    t = torch.rand((2, 6) if per_token else (2,), generator=torch.Generator().manual_seed(1))
    s = t[..., None] if per_token else t[:, None, None]
    x1 = patchify(images, 4)
    exact = s.double() * x1.double() + (1 - s.double()) * noise.double()
    out = interpolate(images, t, 4, noise)
    assert out.dtype == dtype
    # the interpreter cuts off what bfloat16 cannot hold, where a GPU rounds
    floor = 2**-8 if dtype == torch.bfloat16 and on_all_backends == "triton" else 1e-6
    within_twice(out, (s * x1 + (1 - s) * noise).to(dtype), exact, floor)


def test_ends_of_the_path():
    images, noise, _ = inputs()
    assert torch.equal(interpolate(images, torch.zeros(2), 4, noise), noise)
    assert torch.equal(interpolate(images, torch.ones(2), 4, noise), patchify(images, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient(within_twice, dtype):
    images, noise, prediction = inputs(dtype)
    prediction.requires_grad_()
    loss = velocity_loss(prediction, images, 4, noise)
    assert loss.dtype == torch.float32
    target = patchify(images, 4).double() - noise.double()
    exact = (prediction.double() - target).square().mean()
    within_twice(loss, loss, exact, floor=1e-6)
    (gradient,) = torch.autograd.grad(loss, prediction)
    expected = 2 * (prediction.double() - target) / target.numel()
    within_twice(gradient, expected.to(dtype), expected.detach())


# the coefficient of an element of 64 pictures of 448 pixels, 1 / (64 * 1024 * 588), without so many of them
FEW = {"weights": torch.full((2, 6), 6 * 48 / (64 * 1024 * 588) * 2)}


@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**16, 3 * 2.0**16])
@pytest.mark.parametrize(
    "how", [{}, FEW, {**FEW, "reduction": "none"}, {**FEW, "reduction": "sum", "mask": torch.arange(12).view(2, 6) > 3}]
)
def test_float16_gradients_under_a_scaler(within_twice, scale, how):
    """They are stored before what comes in from behind brings them where float16 holds them: 26 % were lost."""
    images, noise, prediction = inputs(torch.float16)
    reduction = how.get("reduction", "mean")
    counted, weights = how.get("mask", torch.ones(2, 6, dtype=torch.bool)), how.get("weights", torch.ones(2, 6))

    def plain(velocity):
        target = patchify(images, 4).to(velocity) - noise.to(velocity)
        losses = (velocity - target).square().mean(-1) * weights.to(velocity) * counted
        return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()

    ours, theirs = (prediction.clone().requires_grad_() for _ in range(2))
    exact = prediction.double().requires_grad_()
    for backward in (torch.Tensor.backward, lambda loss: loss.backward(retain_graph=True)):
        ours.grad = None
        backward(velocity_loss(ours, images, 4, noise, **how).sum() * scale)
        (expected,) = torch.autograd.grad(scale * plain(exact), exact)
        (gradient,) = torch.autograd.grad(scale * plain(theirs.float()), theirs)
        assert ours.grad.dtype == torch.float16
        # a factor that is no power of two rounds what was stored once more
        within_twice(ours.grad, gradient, expected, floor=2**-11 if scale == 3 * 2.0**16 else 1e-6)


def test_the_largest_error_of_float16_has_a_gradient(on_all_backends):
    """What is stored is not the gradient, but less than a quarter of twice the error, which float16 holds."""
    largest = torch.finfo(torch.float16).max
    images, noise = torch.full((1, 3, 28, 42), -largest).half(), torch.zeros(1, 6, 588).half()
    velocity = torch.full((1, 6, 588), largest).half().requires_grad_()
    velocity_loss(velocity, images, 14, noise).backward()
    expected = torch.full_like(velocity, 2 * 2 * largest / velocity.numel())
    assert torch.allclose(velocity.grad, expected, rtol=2**-10)


def test_perfect_prediction_costs_nothing():
    images, noise, _ = inputs()
    assert velocity_loss(patchify(images, 4) - noise, images, 4, noise) == 0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda i, n, v: interpolate(i, torch.zeros(3), 4, n), "t"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, n[:, :5]), "noise"),
        (lambda i, n, v: velocity_loss(v[..., :47], i, 4, n), "velocity"),
        (lambda i, n, v: velocity_loss(v, i, 4, n[:1]), "noise"),
        (lambda i, n, v: velocity_loss(v, i, 5, n), "images"),
    ],
)
def test_wrong_shapes_name_the_argument(call, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(*inputs())


def exact_rows(images, mean, std):
    pixels = images.double() / (255 if images.dtype == torch.uint8 else 1)
    if mean is not None:
        pixels = (pixels - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    return patchify(pixels, 4)


NORMALIZATION = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.mark.parametrize("images_dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_the_whole_contract_against_float64(within_twice, images_dtype, strided):
    """uint8 or float images of any strides, normalised; two repeats; padded rows; seeded noise; weights and a mask."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 8, 12, 3), generator=generator, dtype=torch.uint8)
    images = images if images_dtype == torch.uint8 else (images.float() / 255).to(images_dtype)
    images = images.permute(0, 3, 1, 2)
    images = images if strided else images.contiguous()
    common = {"seed": 11, "offset": 2, "repeats": 2, "columns": 50, **NORMALIZATION}
    t = torch.rand(4, 6, generator=generator)
    x1 = exact_rows(images, *NORMALIZATION.values()).repeat(2, 1, 1)
    x0 = seeded_noise(24, 48, 11, 2).view(4, 6, 48)

    x_t = interpolate(images, t, 4, dtype=torch.float32, **common)
    exact = t[..., None].double() * x1 + (1 - t[..., None].double()) * x0.double()
    within_twice(x_t[..., :48], exact.float(), exact)
    assert (x_t[..., 48:] == 0).all()

    velocity = torch.randn(4, 6, 50, generator=generator).requires_grad_()
    weights = torch.rand(4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    for reduction in ("mean", "sum", "none"):
        loss = velocity_loss(velocity, images, 4, weights=weights, mask=mask, reduction=reduction, **common)
        tokens = (velocity[..., :48].double() - (x1 - x0.double())).square().mean(-1) * weights * mask
        expected = {"none": tokens, "sum": tokens.sum(), "mean": tokens.sum() / mask.sum()}[reduction]
        assert loss.dtype == torch.float32
        within_twice(loss.detach(), expected.detach().float(), expected.detach())
        incoming = torch.rand(loss.shape, generator=generator)
        (ours,) = torch.autograd.grad(loss, velocity, incoming)
        (exact_gradient,) = torch.autograd.grad(expected, velocity, incoming.double())
        within_twice(ours, exact_gradient.float(), exact_gradient.double())
        assert (ours[..., 48:] == 0).all()
        assert (ours[~mask] == 0).all()


def test_seeded_noise_is_the_noise_that_was_passed():
    images, _, prediction = inputs()
    noise = seeded_noise(12, 48, 7).view(2, 6, 48)
    t = torch.rand(2, 6)
    both = interpolate(images, t, 4, noise), interpolate(images, t, 4, seed=7)
    assert torch.allclose(*both, rtol=0, atol=1e-6)
    both = velocity_loss(prediction, images, 4, noise), velocity_loss(prediction, images, 4, seed=7)
    assert torch.allclose(*both, rtol=1e-6)


@pytest.mark.parametrize("first_row", [0, 5, 2**33 - 3])
def test_a_batch_in_pieces_has_the_noise_of_the_whole(first_row):
    """Images and bands of images, each with the row of the seed's noise that its first token has: to the bit."""
    images, _, prediction = inputs()
    t = torch.rand(2, 6)
    common = {"patch_size": 4, "seed": 7, "offset": 3}
    whole = interpolate(images, t, **common, first_row=first_row)
    losses = velocity_loss(prediction, images, **common, first_row=first_row, reduction="none")
    noise = interpolate(images, torch.zeros(2), **common, first_row=first_row)
    assert (noise.view(12, 48) - seeded_noise(12, 48, 7, 3, first_row=first_row)).abs().max() < 1e-6
    for image, (top, bottom) in [(0, (0, 2)), (0, (1, 2)), (1, (0, 1)), (1, (0, 2))]:
        part, tokens = images[image : image + 1, :, 4 * top : 4 * bottom], slice(3 * top, 3 * bottom)
        here = {**common, "first_row": first_row + 6 * image + 3 * top}
        expected = whole[image : image + 1, tokens]
        times = t[image : image + 1, tokens].clone().requires_grad_()
        x_t = interpolate(part, times, **here)
        assert torch.equal(x_t, expected)
        loss = velocity_loss(prediction[image : image + 1, tokens], part, **here, reduction="none")
        assert torch.equal(loss, losses[image : image + 1, tokens])
        difference = patchify(part, 4) - noise[image : image + 1, tokens]
        (for_t,) = torch.autograd.grad(x_t.sum(), times)
        assert torch.allclose(for_t, difference.sum(-1), rtol=1e-4, atol=1e-4)


def test_repeats_go_on_where_the_rows_of_the_first_one_end():
    images, _, _ = inputs()
    both = interpolate(images, torch.zeros(4), 4, seed=7, first_row=9, repeats=2)
    again = interpolate(images, torch.zeros(2), 4, seed=7, first_row=9 + 12)
    assert torch.equal(both[2:], again)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_seed_in_a_tensor_gives_the_same_numbers(shape):
    """Whatever it holds at the time: large numbers, and what is written into it later."""
    images, _, prediction = inputs()
    t = torch.rand(2, 6)
    held = torch.zeros(shape, dtype=torch.int64)
    for seed in (7, 2**62 + 2**40 + 5):
        held.fill_(seed)
        assert torch.equal(
            interpolate(images, t, 4, seed=held, offset=3), interpolate(images, t, 4, seed=seed, offset=3)
        )
        both = (velocity_loss(prediction, images, 4, seed=s, reduction="none") for s in (held, seed))
        assert torch.equal(*both)


def test_the_gradient_of_t_with_a_seed_in_a_tensor():
    images, _, _ = inputs()
    t = torch.rand(2, 6, requires_grad=True)
    both = [torch.autograd.grad(interpolate(images, t, 4, seed=s).sum(), t)[0] for s in (7, torch.tensor(7))]
    assert torch.equal(*both)
    held = torch.tensor(7)
    x_t = interpolate(images, t, 4, seed=held)
    held.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x_t.sum().backward()


def test_a_generator_is_a_seed_and_advances():
    images, _, prediction = inputs()
    t = torch.zeros(2)
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    x_t = interpolate(images, t, 4, seed=first)
    seed = noise_seed(second)
    assert torch.equal(x_t, interpolate(images, t, 4, seed=seed))
    assert not torch.equal(x_t, interpolate(images, t, 4, seed=first))
    second.manual_seed(3)
    assert torch.equal(
        velocity_loss(prediction, images, 4, seed=second), velocity_loss(prediction, images, 4, seed=seed)
    )


def test_a_seed_in_a_tensor_compiles_once():
    """Without being told that anything is dynamic."""

    def step(velocity, images, t, seed):
        x_t = interpolate(images, t, 4, seed=seed)
        return velocity_loss(velocity + 0 * x_t, images, 4, seed=seed)

    images, _, prediction = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for attempt in range(3):
        seed = torch.tensor(100 + attempt)
        with torch._dynamo.config.patch(error_on_recompile=attempt > 0):
            ours = compiled(prediction, images, torch.full((2,), 0.5), seed)
        assert torch.equal(ours, step(prediction, images, torch.full((2,), 0.5), seed))


@pytest.mark.parametrize("chunk", [1, 100, 300])
def test_pieces_on_a_cpu_do_not_show(monkeypatch, chunk):
    images, noise, prediction = inputs()
    t = torch.rand(4)
    calls = (
        lambda: interpolate(images, t, 4, seed=7, repeats=2),
        lambda: velocity_loss(prediction, images, 4, noise, reduction="none"),
        lambda: velocity_loss(prediction, images, 4, seed=1, reduction="none"),
    )
    whole = [call() for call in calls]
    monkeypatch.setattr("uniflow_kernels.ops.pieces.CPU_CHUNK", chunk)
    for call, expected in zip(calls, whole, strict=True):
        assert torch.allclose(call(), expected, rtol=1e-6)


def test_every_input_has_its_gradient():
    """Against autograd through the formulas."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 12, generator=generator).requires_grad_()
    noise, velocity = (torch.randn(4, 6, 48, generator=generator).requires_grad_() for _ in range(2))

    def rows():
        shift, scale = (torch.tensor(NORMALIZATION[name])[:, None, None] for name in ("mean", "std"))
        return patchify((images - shift) / scale, 4).repeat(2, 1, 1)

    for t in (torch.rand(4, generator=generator), torch.rand(4, 6, generator=generator)):
        t.requires_grad_()
        s = t.reshape(*t.shape, *(1,) * (3 - t.ndim))
        incoming = torch.randn(4, 6, 48, generator=generator)
        ours = interpolate(images, t, 4, noise, repeats=2, **NORMALIZATION)
        plain = s * rows() + (1 - s) * noise
        both = [torch.autograd.grad(x, (images, t, noise), incoming) for x in (ours, plain)]
        for mine, theirs in zip(*both, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    ours = velocity_loss(velocity, images, 4, noise, repeats=2, **NORMALIZATION)
    plain = (velocity - (rows() - noise)).square().mean()
    both = [torch.autograd.grad(3 * x, (velocity, images, noise)) for x in (ours, plain)]
    for mine, theirs in zip(*both, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_two_backward_passes_over_one_graph():
    images, noise, prediction = inputs()
    prediction.requires_grad_()
    loss = 3 * velocity_loss(prediction, images, 4, noise)
    (first,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, prediction)
    assert torch.equal(first, kept)
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused():
    images, noise, prediction = inputs()
    prediction.requires_grad_()
    loss = velocity_loss(prediction, images, 4, noise)
    with pytest.raises(RuntimeError, match="velocity_loss: it has no second derivative"):
        torch.autograd.grad(loss, prediction, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_tokens_may_hold_anything(dtype):
    images, noise, prediction = inputs(dtype)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2] = False
    weights = torch.rand(2, 6)
    expected = velocity_loss(prediction, images, 4, noise, mask=mask, weights=weights)
    prediction[0, 2] = weights[0, 2] = torch.nan
    prediction.requires_grad_()
    loss = velocity_loss(prediction, images, 4, noise, mask=mask, weights=weights)
    assert torch.equal(loss, expected)
    assert torch.isfinite(torch.autograd.grad(loss, prediction)[0]).all()
    nothing = velocity_loss(prediction, images, 4, noise, mask=torch.zeros_like(mask))
    assert nothing == 0


def test_empty_batches():
    images = torch.zeros(0, 3, 8, 12)
    velocity = torch.zeros(0, 6, 48, requires_grad=True)
    assert interpolate(images, torch.zeros(0), 4, seed=0).shape == (0, 6, 48)
    loss = velocity_loss(velocity, images, 4, seed=0)
    assert loss == 0
    assert torch.autograd.grad(loss, velocity)[0].shape == velocity.shape
    losses = velocity_loss(velocity, images, 4, seed=0, reduction="none")
    assert torch.autograd.grad(losses, velocity, torch.ones(0, 6))[0].shape == velocity.shape


def test_registered_ops_are_sound():
    images, noise, prediction = inputs()
    t = torch.rand(2, 6)
    interpolate_op, loss_op = torch.ops.uniflow_kernels.interpolate, torch.ops.uniflow_kernels.velocity_loss
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for x0, mean, std in ((noise.clone().requires_grad_(), None, None), (None, [0.5] * 3, [0.2] * 3)):
        held = torch.tensor(3) if x0 is None else None
        arguments = (images, t, x0, held, mean, std, 5, 0, 3, 4, 1, 52, torch.float32)
        torch.library.opcheck(interpolate_op, arguments, test_utils=tests)
        for reduction in ("mean", "none"):
            arguments = (prediction.clone().requires_grad_(), images, x0, held, None, None, mean, std, 5, 0, 3, 4, 1)
            torch.library.opcheck(loss_op, (*arguments, reduction, True), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_whole_and_once(dtype):
    """The first change of the number of tokens makes it dynamic; after that nothing is compiled again."""

    def step(velocity, images, t, seed):
        x_t = interpolate(images, t, 4, seed=seed, first_row=2 * seed)
        return velocity_loss(velocity + 0 * x_t, images, 4, seed=seed, first_row=2 * seed)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for attempt, (batch, height) in enumerate(((2, 8), (3, 12), (5, 20))):
        images, t = torch.rand(batch, 3, height, 12), torch.rand(batch)
        velocity = torch.randn(batch, height // 4 * 3, 48, dtype=dtype)
        gradients = []
        for function in (compiled, step):
            leaf = velocity.clone().requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=attempt > 0):
                loss = function(leaf, images, t, 100 + attempt)
            (2 * loss).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4), ValueError, "noise, seed: expected exactly one"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, n, 3), ValueError, "noise, seed: expected exactly one"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, seed=-1), ValueError, r"seed: expected an integer in"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, seed=1, first_row=-1), ValueError, r"first_row: .*2\^48\)"),
        (
            lambda i, n, v: velocity_loss(v, i, 4, seed=1, first_row=2**48),
            ValueError,
            r"first_row: .*got 281474976710656",
        ),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, seed=torch.tensor(1.0)), TypeError, "seed: .*torch.int64"),
        (lambda i, n, v: velocity_loss(v, i, 4, seed=torch.zeros(2).long()), ValueError, r"seed: .*\[\] or \[1\]"),
        (lambda i, n, v: velocity_loss(v, i, 4, seed=torch.tensor(1, device="meta")), ValueError, "seed: .*device"),
        (lambda i, n, v: interpolate(i.long(), torch.zeros(2), 4, n), TypeError, "images: .*uint8, got torch.int64"),
        (lambda i, n, v: interpolate(i + 0j, torch.zeros(2), 4, n), TypeError, "images: .*got torch.complex64"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, n + 0j), TypeError, "noise: .*got torch.complex64"),
        (lambda i, n, v: interpolate(i, torch.zeros(2) + 0j, 4, n), TypeError, "t: expected real .*torch.complex64"),
        (lambda i, n, v: velocity_loss(v + 0j, i, 4, n), TypeError, "velocity: .*got torch.complex64"),
        (lambda i, n, v: velocity_loss(v, i, 4, n, weights=torch.ones(2, 6) + 0j), TypeError, "weights: expected real"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, n, columns=40), ValueError, "columns: .*48, got 40"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, n, repeats=0), ValueError, "repeats: expected at least 1"),
        (lambda i, n, v: interpolate(i, torch.zeros(2), 4, n, mean=[0.0] * 3), ValueError, "mean, std: "),
        (lambda i, n, v: velocity_loss(v, i, 4, n, mean=[0.0], std=[1.0]), ValueError, "mean: expected 3 numbers"),
        (lambda i, n, v: velocity_loss(v, i, 4, n, reduction="avg"), ValueError, "reduction: .*'avg'"),
        (lambda i, n, v: velocity_loss(v, i, 4, n, weights=torch.ones(2)), ValueError, r"weights: .*\(2, 6\)"),
        (lambda i, n, v: velocity_loss(v, i, 4, n, mask=torch.ones(2, 6)), TypeError, "mask: expected torch.bool"),
        (
            lambda i, n, v: velocity_loss(v, i, 4, n, weights=torch.ones(2, 6, requires_grad=True)),
            ValueError,
            "weights: expected constants",
        ),
    ],
)
def test_wrong_inputs_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(*inputs())

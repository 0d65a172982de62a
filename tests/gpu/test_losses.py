"""The losses' kernels on a GPU: each backend against plain PyTorch and float64, and against the other."""

import pytest
import torch

from uniflow_kernels import (
    LayerwiseDistillation,
    backend,
    cuda_kernels,
    interpolate,
    layerwise_distillation,
    noise_seed,
    patchify,
    seeded_noise,
    unpatchify,
    velocity_loss,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALIZATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


# not all with all, since each is a kernel to be compiled, for half a second or more: any two values of two parameters
# of FLOW meet, and every dtype has two sizes of PATCHES, every size two dtypes
SHAPES = [((448, 448), 14, 588), ((448, 448), 14, 592), ((21, 35), 7, 147)]
FLOW = [(a, b, *SHAPES[(i + j) % 3]) for i, a in enumerate([torch.uint8, *DTYPES]) for j, b in enumerate(DTYPES)]
SIZES = [((448, 448), 14), ((224, 336), 16), ((21, 35), 7), ((6, 10), 1), ((9, 15), 3)]
PATCHES = [
    (dtype, *SIZES[(i + k) % 5]) for i, dtype in enumerate([torch.uint8, *DTYPES, torch.float64]) for k in (0, 1)
]


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    if request.param == "cuda" and cuda_kernels.why_not_built():
        pytest.skip(cuda_kernels.why_not_built())
    return request.param


def pictures(batch, size, dtype, strided=False):
    images = torch.randint(0, 256, (batch, *size, 3), device="cuda", dtype=torch.uint8)
    images = images if dtype == torch.uint8 else (images / 255).to(dtype)
    images = images.permute(0, 3, 1, 2)
    return images if strided else images.contiguous()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("image_dtype", "dtype", "size", "patch", "columns"), FLOW)
@pytest.mark.parametrize("source", ["seed", "noise"])
def test_flow(within_twice, kernels, image_dtype, dtype, size, patch, columns, source):
    images = pictures(2, size, image_dtype, strided=source == "noise")
    tokens, length = (size[0] // patch) * (size[1] // patch), 3 * patch * patch
    noise = seeded_noise(4 * tokens, length, 5, 1, "cuda").view(4, tokens, length)
    given = {"seed": 5, "offset": 1} if source == "seed" else {"noise": noise.to(dtype)}
    x0 = (noise if source == "seed" else noise.to(dtype)).double()
    common = {"repeats": 2, "columns": columns, **NORMALIZATION, **given}
    t = torch.rand(4, tokens, device="cuda")
    pixels = images.double() / (255 if image_dtype == torch.uint8 else 1)
    shift, scale = (
        torch.tensor(NORMALIZATION[name], device="cuda").double()[:, None, None] for name in ("mean", "std")
    )
    x1 = patchify((pixels - shift) / scale, patch).repeat(2, 1, 1)

    exact = t[..., None].double() * x1 + (1 - t[..., None].double()) * x0
    with backend(kernels):
        ours = interpolate(images, t, patch, dtype=dtype, **common)
    with backend("eager"):
        plain = interpolate(images, t, patch, dtype=dtype, **common)
    within_twice(ours[..., :length], plain[..., :length], exact, floor=2e-6)
    assert (ours[..., length:] == 0).all()

    velocity = torch.randn(4, tokens, columns, device="cuda").to(dtype).requires_grad_()
    weights, mask = torch.rand(4, tokens, device="cuda"), torch.rand(4, tokens, device="cuda") < 0.7
    losses, gradients = {}, {}
    for name in (kernels, "eager"):
        with backend(name):
            losses[name] = velocity_loss(velocity, images, patch, weights=weights, mask=mask, **common)
            again = velocity_loss(velocity, images, patch, weights=weights, mask=mask, **common)
            assert torch.equal(losses[name], again)
            (gradients[name],) = torch.autograd.grad(3 * losses[name], velocity)
    tokens_exact = (velocity[..., :length].double() - (x1 - x0)).square().mean(-1) * weights * mask
    exact = tokens_exact.sum() / mask.sum()
    within_twice(losses[kernels].detach(), losses["eager"].detach(), exact.detach(), floor=1e-5)
    (exact_gradient,) = torch.autograd.grad(3 * exact, velocity)
    within_twice(gradients[kernels], gradients["eager"], exact_gradient.double(), floor=1e-5)
    assert (gradients[kernels][..., length:] == 0).all()


def test_seeded_noise_is_the_definition(kernels):
    """t = 0 leaves nothing but the noise; the definition is computed on a CPU."""
    images = torch.zeros(8, 3, 448, 448, device="cuda")
    with backend(kernels):
        ours = interpolate(images, torch.zeros(8, device="cuda"), 14, seed=2**62 + 3, offset=2**40 + 1)
    expected = seeded_noise(8 * 1024, 588, 2**62 + 3, 2**40 + 1)
    assert (ours.cpu().view(-1, 588) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["eager", "triton", "cuda"])
@pytest.mark.parametrize("weighted", [False, True])
def test_float16_gradients_under_a_scaler(within_twice, name, weighted):
    """Stored where float16 holds them; the factor is not rounded to float16 before it is used."""
    if name == "cuda" and cuda_kernels.why_not_built():
        pytest.skip(cuda_kernels.why_not_built())
    images, noise = pictures(64, (448, 448), torch.float16), torch.randn(64, 1024, 588, device="cuda").half()
    velocity = torch.randn(64, 1024, 588, device="cuda").half().requires_grad_()
    weights = torch.rand(64, 1024, device="cuda") if weighted else torch.ones(64, 1024, device="cuda")
    for keep in (True, False):
        with backend(name):
            loss = 2.0**16 * velocity_loss(velocity, images, 14, noise, weights=weights if weighted else None)
            (ours,) = torch.autograd.grad(loss, velocity, retain_graph=keep)
        error = velocity.detach().double() - (patchify(images, 14).double() - noise.double())
        exact = 2.0**17 * error * weights[..., None].double() / error.numel()
        within_twice(ours, exact.half(), exact)


@pytest.mark.parametrize("first_row", [0, 2**33 - 3])
def test_a_batch_in_pieces_has_the_noise_of_the_whole(kernels, first_row):
    """An image and a band of one, to the bit."""
    images, t = pictures(2, (448, 448), torch.uint8), torch.rand(2, 1024, device="cuda")
    velocity = torch.randn(2, 1024, 588, device="cuda")
    common = {"patch_size": 14, "seed": 5, **NORMALIZATION}
    with backend(kernels):
        whole = interpolate(images, t, **common, first_row=first_row)
        losses = velocity_loss(velocity, images, **common, first_row=first_row, reduction="none")
        noise = interpolate(images, 0 * t, **common, first_row=first_row)
        for part, tokens, first in ((images[1:], slice(0, 1024), 1024), (images[1:, :, 42:70], slice(96, 160), 1120)):
            here = {**common, "first_row": first_row + first}
            assert torch.equal(interpolate(part, t[1:, tokens], **here), whole[1:, tokens])
            loss = velocity_loss(velocity[1:, tokens], part, **here, reduction="none")
            assert torch.equal(loss, losses[1:, tokens])
    expected = seeded_noise(2 * 1024, 588, 5, first_row=first_row)  # on a CPU
    assert (noise.cpu().view(-1, 588) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "size", "patch"), PATCHES)
def test_patches(kernels, dtype, size, patch):
    """To the bit, of images of any strides and rows of any strides, and as each other's gradient."""
    dense = torch.randint(0, 256, (3, 3, size[0] + 2, size[1] + 6), device="cuda").to(dtype)
    for images in (
        dense[:, :, : size[0], : size[1]].contiguous(),
        dense[:, :, : size[0], : size[1]].contiguous(memory_format=torch.channels_last),
        dense[:, :, 2:, 3:-3],
        dense[:1, :, 1:-1, 6:].expand(3, -1, -1, -1),
    ):
        with backend("eager"):
            expected = patchify(images, patch)
        with backend(kernels):
            rows = patchify(images, patch)
            assert torch.equal(rows, expected)
            padded = torch.cat([rows, rows], -1)[..., : rows.shape[-1]]
            turned = rows.permute(1, 2, 0).contiguous().permute(2, 0, 1)
            for given in (rows, padded, turned):
                assert torch.equal(unpatchify(given, patch, size), images)
    if dtype.is_floating_point:
        with backend(kernels):
            leaf, incoming = images.clone().requires_grad_(), torch.randn_like(rows.float()).to(dtype)
            (gradient,) = torch.autograd.grad(patchify(leaf, patch), leaf, incoming)
            assert torch.equal(gradient, unpatchify(incoming, patch, size))


def test_a_cuda_graph_replays_with_the_seed_it_then_finds(kernels):
    images = pictures(2, (56, 56), torch.float32)
    t, held = torch.rand(2, device="cuda"), torch.tensor(0, device="cuda")
    velocity = torch.randn(2, 16, 588, device="cuda")
    with backend(kernels):

        def step(seed):
            return interpolate(images, t, 14, seed=seed), velocity_loss(velocity, images, 14, seed=seed)

        step(held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(held)
        for seed in (5, 2**62 + 2**40 + 1):
            held.fill_(seed)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, step(seed), strict=True))


def test_both_backends_agree():
    if cuda_kernels.why_not_built():
        pytest.skip(cuda_kernels.why_not_built())
    images = pictures(4, (224, 224), torch.uint8)
    velocity = torch.randn(4, 256, 588, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    losses, gradients = [], []
    for name in ("triton", "cuda"):
        with backend(name):
            losses.append(velocity_loss(velocity, images, 14, seed=1))
            gradients.append(torch.autograd.grad(losses[-1], velocity)[0].float())
    assert torch.allclose(*losses, rtol=1e-5)
    assert torch.allclose(*gradients, rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layers", "width"), [(1, 64), (24, 1024), (3, 1000), (70, 16), (2, 100), (2, 4096)])
@pytest.mark.parametrize("detach", [True, False])
def test_distillation(within_twice, kernels, dtype, layers, width, detach):
    student, teacher = ([torch.randn(2, 33, width, device="cuda").to(dtype) for _ in range(layers)] for _ in range(2))
    student[0][0, 3] = 0
    doubles = [s.double().requires_grad_() for s in student]
    for s in student:
        s.requires_grad_()
    alphas = torch.stack(
        [
            1 - torch.cosine_similarity(s[:, 1:], t[:, 1:].double(), dim=-1).mean()
            for s, t in zip(doubles, teacher, strict=True)
        ]
    )
    depth = torch.arange(1, layers + 1, device="cuda").double().log()
    weights = torch.softmax(2 * (alphas.detach() if detach else alphas) + depth, 0)
    exact = (weights * alphas).sum()
    exact_gradients = torch.autograd.grad(exact, doubles)
    results = {}
    for name in (kernels, "eager"):
        with backend(name):
            loss, *_ = layerwise_distillation(student, teacher, detach_weights=detach, skip_tokens=1)
            again, *_ = layerwise_distillation(student, teacher, detach_weights=detach, skip_tokens=1)
            assert torch.equal(loss, again)
            results[name] = loss.detach(), torch.autograd.grad(loss, student)
    within_twice(results[kernels][0], results["eager"][0], exact.detach(), floor=1e-5)
    for ours, plain, theirs in zip(results[kernels][1], results["eager"][1], exact_gradients, strict=True):
        assert torch.isfinite(ours).all()
        keep = torch.ones_like(theirs)
        keep[0, 3] = 0  # a token of zeros has a gradient of another size, checked by being finite
        within_twice(ours * keep.to(dtype), plain * keep.to(dtype), theirs * keep, floor=1e-5)


def test_layer_by_layer(kernels):
    student, teacher = (torch.randn(4, 2, 33, 64, device="cuda") for _ in range(2))
    student.requires_grad_()
    streamed = LayerwiseDistillation(layers=4, skip_tokens=1)
    with backend(kernels):
        for layer in range(4):
            streamed.push(layer + 1, student[layer], teacher[layer])
        ours, expected = streamed.result(), layerwise_distillation(student, teacher, skip_tokens=1)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_nothing_waits_for_the_device(kernels):
    images = pictures(2, (56, 56), torch.uint8)
    velocity = torch.randn(2, 16, 588, device="cuda", requires_grad=True)
    states = [torch.randn(2, 17, 64, device="cuda", requires_grad=True) for _ in range(3)]
    mask = torch.rand(2, 16, device="cuda") < 0.5
    generator, held = torch.Generator("cuda").manual_seed(0), torch.tensor(3, device="cuda")

    def step():
        seed = noise_seed(generator)
        interpolate(images, torch.rand(2, device="cuda"), 14, seed=seed, **NORMALIZATION)
        interpolate(images, torch.rand(2, device="cuda"), 14, seed=held, **NORMALIZATION)
        unpatchify(patchify(images, 14), 14)
        loss = velocity_loss(velocity, images, 14, seed=seed, mask=mask, **NORMALIZATION)
        (loss + layerwise_distillation(states, [s.detach() for s in states], skip_tokens=1)[0]).backward()

    with backend(kernels):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_generator_gives_a_seed_and_advances():
    first, second = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    seeds = [noise_seed(first) for _ in range(3)]
    assert seeds == [noise_seed(second) for _ in range(3)]
    assert len(set(seeds)) == 3


def test_a_thousand_runs_give_the_same_bits(kernels):
    images = pictures(2, (112, 112), torch.float32)
    velocity = torch.randn(2, 64, 588, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    states, taught = (list(torch.randn(3, 2, 65, 256, device="cuda").unbind()) for _ in range(2))
    with backend(kernels):
        expected = None
        for _ in range(1000):
            loss = velocity_loss(velocity, images, 14, seed=4)
            both = loss.detach(), layerwise_distillation(states, taught)[0]
            expected = expected or both
            assert all(torch.equal(a, b) for a, b in zip(both, expected, strict=True))


def test_more_than_2_to_the_31_elements(kernels):
    """The last image of a batch too long for 32-bit offsets is the same as it is alone."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    repeats = 3570  # of one image of 448 px: 602112 elements each
    images = torch.rand(1, 3, 448, 448, device="cuda", dtype=torch.bfloat16)
    t = torch.rand(repeats, device="cuda")
    noise = seeded_noise(1024, 588, 1, device="cuda", first_row=(repeats - 1) * 1024)
    with backend(kernels):
        x_t = interpolate(images, t, 14, seed=1, repeats=repeats)
        assert x_t.numel() > 2**31
        expected = interpolate(images, t[-1:], 14, noise[None])
        assert torch.allclose(x_t[-1:].float(), expected.float(), atol=2**-7)
        many = images.expand(repeats, -1, -1, -1)
        rows = patchify(many, 14)
        assert torch.equal(rows[-1], patchify(images, 14)[0])
        assert torch.equal(unpatchify(rows, 14)[-1], images[0])
        del rows
        losses = velocity_loss(x_t, images, 14, seed=1, repeats=repeats, reduction="none")
        alone = velocity_loss(x_t[-1:], images, 14, noise[None], reduction="none")
    assert torch.allclose(losses[-1:], alone, rtol=1e-4)


@pytest.mark.sanitizer
def test_compute_sanitizer(sanitized, kernels):
    sanitized(
        "import torch; from uniflow_kernels import backend, interpolate, layerwise_distillation, velocity_loss;"
        f"backend({kernels!r}).__enter__(); images = torch.rand(2, 3, 21, 35, device='cuda');"
        "t = torch.rand(2, 15, device='cuda'); x = interpolate(images, t, 7, seed=1, columns=150);"
        "velocity_loss(x.requires_grad_(), images, 7, seed=1, columns=150).backward();"
        "student, teacher = torch.randn(2, 3, 2, 5, 40, device='cuda').requires_grad_();"
        "layerwise_distillation(student, teacher.detach())[0].backward(); torch.cuda.synchronize()"
    )

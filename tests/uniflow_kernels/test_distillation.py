import contextlib
import math

import pytest
import torch

from uniflow_kernels import LayerwiseDistillation, backend, layerwise_distillation

pytestmark = pytest.mark.usefixtures("on_all_backends")


def layers(count=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def formula(student, teacher, beta, detach):
    """The paper's sums, written out in float64."""
    alphas = []
    for s, t in zip(student, teacher, strict=True):
        cosine = (s.double() * t.double()).sum(-1) / (s.double().norm(dim=-1) * t.double().norm(dim=-1))
        alphas.append(1 - cosine.mean())
    deep = [(layer / len(alphas)) * torch.exp(beta * alpha) for layer, alpha in enumerate(alphas, start=1)]
    weights = torch.stack(deep) / sum(deep)
    weights = weights.detach() if detach else weights
    return (weights * torch.stack(alphas)).sum(), torch.stack(alphas), weights


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("beta", [0.0, 2.0, 7.5])
def test_value_and_gradient(detach, beta):
    student, teacher = layers(seed=0), layers(seed=1)
    for s in student:
        s.requires_grad_()
    loss, alpha, weights = layerwise_distillation(student, teacher, beta, detach)
    expected = formula(student, teacher, beta, detach)
    for ours, exact in zip((loss, alpha, weights), expected, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=1e-5)
    ours = torch.autograd.grad(loss, student)
    exact = torch.autograd.grad(expected[0], student)
    for mine, theirs in zip(ours, exact, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)
    assert not alpha.requires_grad
    assert not weights.requires_grad


def test_whether_weights_are_differentiated_matters():
    student, teacher = [s.requires_grad_() for s in layers(seed=0)], layers(seed=1)
    gradients = [
        torch.autograd.grad(layerwise_distillation(student, teacher, detach_weights=d)[0], student[0])[0]
        for d in (True, False)
    ]
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_deeper_and_worse_aligned_layers_weigh_more():
    teacher = layers(3)
    _, alpha, weights = layerwise_distillation(teacher, teacher)
    assert alpha.abs().max() < 1e-6
    assert torch.allclose(weights, torch.tensor([1 / 6, 2 / 6, 3 / 6]), atol=1e-5)
    _, alpha, weights = layerwise_distillation([-teacher[0], teacher[1], teacher[2]], teacher)
    assert math.isclose(alpha[0], 2, abs_tol=1e-5)
    assert weights[0] > weights[2] > weights[1]


def test_stacked_and_half_precision_inputs_and_large_beta():
    student, teacher = layers(dtype=torch.bfloat16, seed=0), layers(dtype=torch.bfloat16, seed=1)
    listed = layerwise_distillation(student, teacher)
    stacked = layerwise_distillation(torch.stack(student), torch.stack(teacher))
    for a, b in zip(listed, stacked, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert all(torch.isfinite(value).all() for value in layerwise_distillation(student, teacher, beta=1000.0))


def test_a_class_token_is_left_out_by_a_view():
    student, teacher = layers(seed=0), layers(seed=1)
    views = layerwise_distillation([s[:, 1:] for s in student], [t[:, 1:] for t in teacher])
    copies = layerwise_distillation([s[:, 1:].clone() for s in student], [t[:, 1:].clone() for t in teacher])
    assert torch.equal(views[0], copies[0])


def test_layers_that_lie_otherwise_and_more_than_a_launch_takes():
    student, teacher = layers(40, seed=0), layers(40, seed=1)
    wide = [torch.cat([s, s], -1)[..., :8] if i in (0, 3, 4, 39) else s for i, s in enumerate(student)]
    _, alpha, _ = layerwise_distillation(wide, teacher)
    assert torch.equal(alpha, layerwise_distillation(student, teacher)[1])
    assert torch.allclose(alpha.double(), formula(student, teacher, 2.0, True)[1], rtol=1e-5)


def test_zero_tokens_have_finite_gradients():
    student, teacher = layers(2), layers(2, seed=1)
    student[0] = torch.zeros_like(student[0]).requires_grad_()
    loss, alpha, _ = layerwise_distillation(student, teacher)
    assert alpha[0] == 1
    assert torch.isfinite(torch.autograd.grad(loss, student[0])[0]).all()


def test_the_teacher_gets_no_gradient():
    student, teacher = [s.requires_grad_() for s in layers(seed=0)], [t.requires_grad_() for t in layers(seed=1)]
    layerwise_distillation(student, teacher)[0].backward()
    assert all(s.grad is not None for s in student)
    assert all(t.grad is None for t in teacher)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="as many layers in both, at least one, got 4 and 3"):
        layerwise_distillation(layers(4), layers(3))
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        layerwise_distillation([], [])
    wrong = layers(4)
    wrong[2] = wrong[2][:, 1:]
    with pytest.raises(ValueError, match=r"teacher: layer 3 has shape \(2, 4, 8\), expected the student's \(2, 5, 8\)"):
        layerwise_distillation(layers(4), wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_skipped_tokens_are_left_out_without_a_copy(within_twice, dtype):
    student, teacher = layers(dtype=dtype, seed=0), layers(dtype=dtype, seed=1)
    for s in student:
        s.requires_grad_()
    loss = layerwise_distillation(student, teacher, skip_tokens=1)[0]
    doubles = [s.detach().double().requires_grad_() for s in student]
    exact = formula([s[:, 1:] for s in doubles], [t[:, 1:] for t in teacher], 2.0, True)[0]
    assert torch.allclose(loss.double(), exact, rtol=1e-5)
    ours, expected = torch.autograd.grad(loss, student), torch.autograd.grad(exact, doubles)
    for mine, theirs in zip(ours, expected, strict=True):
        within_twice(mine, theirs.to(dtype), theirs, floor=1e-5 if dtype == torch.float32 else 1e-2)
        assert (mine[:, 0] == 0).all()


def test_pieces_on_a_cpu_do_not_show(monkeypatch):
    student, teacher = [s.requires_grad_() for s in layers(2)], layers(2, seed=1)
    whole = torch.autograd.grad(layerwise_distillation(student, teacher, skip_tokens=1)[0], student)
    for chunk in (1, 20, 50):
        monkeypatch.setattr("uniflow_kernels.ops.pieces.CPU_CHUNK", chunk)
        pieces = torch.autograd.grad(layerwise_distillation(student, teacher, skip_tokens=1)[0], student)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_tokens_are_finite_in_every_dtype(dtype):
    student, teacher = layers(2, dtype), layers(2, dtype, seed=1)
    student[0][0, 1] = 0
    teacher[1][0, 2] = 0
    for s in student:
        s.requires_grad_()
    loss = layerwise_distillation(student, teacher)[0]
    gradients = torch.autograd.grad(loss, student)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if dtype == torch.float32:
        plain = [1 - torch.cosine_similarity(s, t, dim=-1).mean() for s, t in zip(student, teacher, strict=True)]
        weights = layerwise_distillation(student, teacher)[2]
        expected = torch.autograd.grad(sum(w * a for w, a in zip(weights, plain, strict=True)), student)
        for mine, theirs in zip(gradients, expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 300.0, 3e4])
@pytest.mark.parametrize("keep", [True, False])
def test_float16_gradients_under_a_scaler(within_twice, norm, keep):
    """A token's is as small as the token is long: of long ones float16 holds little, of short ones too much."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 2, 40, 64, generator=generator) for _ in range(2))
    student = [(s * norm / 8 * 2 ** torch.rand(2, 40, 1, generator=generator)).half() for s in student]
    teacher = list(teacher.half().unbind())
    leaves = [s.requires_grad_() for s in student]

    def plain(dtype):
        inputs = [s.detach().clone().to(torch.promote_types(dtype, torch.float16)).requires_grad_() for s in student]
        losses = [1 - torch.cosine_similarity(s, t.to(s), dim=-1).mean() for s, t in zip(inputs, teacher, strict=True)]
        return torch.autograd.grad(2.0**16 * sum(losses) / 2, inputs)

    loss = layerwise_distillation(leaves, teacher, layer_weights="uniform")[0]
    ours = torch.autograd.grad(2.0**16 * loss, leaves, retain_graph=keep)
    for mine, theirs, exact in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert mine.dtype == torch.float16
        within_twice(mine, theirs.half(), exact, floor=2**-11)  # weights that are no power of two round once more


@pytest.mark.parametrize("sides", [(torch.float64, torch.float64), (torch.float64, torch.float32)])
def test_float64(sides):
    """In float32 as all else, with gradients in the student's dtype."""
    student, teacher = layers(2, torch.float32), layers(2, torch.float32, seed=1)
    expected_leaves = [s.clone().requires_grad_() for s in student]
    leaves = [s.to(sides[0]).requires_grad_() for s in student]
    with backend("eager"):
        loss = layerwise_distillation(leaves, [t.to(sides[1]) for t in teacher])[0]
        expected = layerwise_distillation(expected_leaves, teacher)[0]
        assert torch.equal(loss, expected)
        ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, expected_leaves)
    for mine, single in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float64
        assert torch.allclose(mine.float(), single, rtol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_layer_by_layer(detach):
    student, teacher = [s.requires_grad_() for s in layers(seed=0)], layers(seed=1)
    streamed = LayerwiseDistillation(layers=4, beta=3.0, detach_weights=detach, skip_tokens=1)
    for _ in range(2):  # the second step begins anew
        for layer in (2, 1, 4, 3):
            streamed.push(layer, student[layer - 1], teacher[layer - 1])
        ours = streamed.result()
    expected = layerwise_distillation(student, teacher, 3.0, detach, skip_tokens=1)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    for mine, theirs in zip(
        torch.autograd.grad(ours[0], student), torch.autograd.grad(expected[0], student), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_layer_by_layer_keeps_nothing_of_the_teacher():
    import weakref

    streamed = LayerwiseDistillation(layers=1)
    student, (teacher,) = layers(1)[0].requires_grad_(), layers(1, seed=1)
    streamed.push(1, student, teacher)
    gone = weakref.ref(teacher)
    del teacher
    assert gone() is None
    streamed.result()[0].backward()


@pytest.mark.parametrize("layer_by_layer", [True, False])
@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float64, torch.float32)],
)
def test_a_narrower_teacher_is_kept_instead_of_the_gradient(layer_by_layer, wide, narrow):
    """To the same numbers, twice if wanted."""

    def run(teacher, keep=False):
        student, saved = [s.requires_grad_() for s in layers(dtype=wide)], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            if layer_by_layer:
                streamed = LayerwiseDistillation(4, skip_tokens=1)
                for layer, sides in enumerate(zip(student, teacher, strict=True), start=1):
                    streamed.push(layer, *sides)
                found = streamed.result()
            else:
                found = layerwise_distillation(student, teacher, skip_tokens=1)
        gradients = torch.autograd.grad(3 * found[0], student, retain_graph=keep)
        if keep:
            assert all(map(torch.equal, gradients, torch.autograd.grad(3 * found[0], student)))
        return [*found, *gradients], [t.data_ptr() for t in saved], student

    with backend("eager") if wide == torch.float64 else contextlib.nullcontext():
        teacher = layers(dtype=narrow, seed=1)
        ours, saved, student = run(teacher, keep=True)
        plain, without, _ = run([t.to(wide) for t in teacher])
    assert all(map(torch.equal, ours, plain))
    kept = {t.data_ptr() for t in (*student, *teacher)}
    assert kept <= set(saved)
    assert not kept & set(without)


def test_layer_by_layer_wrong_use():
    streamed = LayerwiseDistillation(layers=2)
    (x,) = layers(1)
    streamed.push(1, x, x)
    with pytest.raises(ValueError, match="layer: 1 has been pushed already"):
        streamed.push(1, x, x)
    with pytest.raises(ValueError, match="layer: expected 1 to 2, got 3"):
        streamed.push(3, x, x)
    with pytest.raises(ValueError, match="layer: 2 of 2 not pushed yet"):
        streamed.result()
    with pytest.raises(ValueError, match="skip_tokens: expected 0 to 5 tokens, got 6"):
        layerwise_distillation([x], [x], skip_tokens=6)
    with pytest.raises(TypeError, match=r"student: layer 1: .*torch.int64"):
        layerwise_distillation([x.long()], [x])


def test_two_backward_passes_over_one_graph():
    student, teacher = [s.requires_grad_() for s in layers(seed=0)], layers(seed=1)
    loss = layerwise_distillation(student, teacher)[0]
    first = torch.autograd.grad(loss, student, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, student)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(a, b)


def test_registered_op_is_sound_and_compiles_once():
    student, teacher = [s.requires_grad_() for s in layers(2)], layers(2, seed=1)
    # without the check that compares outputs after the backward pass: it scales the stored gradients in place
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.uniflow_kernels.cosine_distances
    torch.library.opcheck(op, (student, teacher, 1, True), test_utils=tests)
    detached = [s.detach() for s in student]
    narrow = [t.bfloat16() for t in teacher]
    torch.library.opcheck(op, (student, narrow, 1, False), test_utils=(*tests, "test_aot_dispatch_dynamic"))
    torch.library.opcheck(op, (detached, teacher, 1, False), test_utils=(*tests, "test_aot_dispatch_dynamic"))

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t: layerwise_distillation(s, t, skip_tokens=1)[0], fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for attempt, shape in enumerate(((2, 5, 8), (3, 9, 8), (4, 17, 8))):
        student, teacher = torch.randn(shape), torch.randn(shape)
        student.requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=attempt > 0):
            ours = torch.autograd.grad(compiled([student], [teacher]), student)[0]
        plain = torch.autograd.grad(layerwise_distillation([student], [teacher], skip_tokens=1)[0], student)[0]
        assert torch.equal(ours, plain)
    narrow = teacher.bfloat16()
    ours = torch.autograd.grad(compiled([student], [narrow]), student)[0]
    assert torch.equal(ours, torch.autograd.grad(compiled([student], [narrow.float()]), student)[0])


def test_no_tokens():
    student = torch.zeros(0, 5, 8, requires_grad=True)
    loss, alpha, _ = layerwise_distillation([student], [student.detach()])
    assert alpha == 0
    assert torch.autograd.grad(loss, student)[0].shape == student.shape

import copy
import weakref

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.live_bytes import LiveBytes
from uniflow import EncoderTeacher, UniFlowObjective, encoder, normalize, transformer
from uniflow_kernels import backend, layerwise_distillation, patchify
from uniflow_kernels.modules.fp8_linear import Fp8Linear


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, noise = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 16, 16), (2, 16, 48)))
    return images, torch.rand(2, 16, generator=generator), noise


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("per_image", [False, True])
def test_both_losses_against_their_formulas(tiny, per_image):
    student = tiny()
    teacher = copy.deepcopy(student)
    objective = UniFlowObjective(student, beta=3.0, flow_weight=0.7, distill_weight=0.4)
    perturb(student)
    images, t, noise = batch()
    t = t[:, 0] if per_image else t
    losses = objective(images, t, noise)

    s = t.view(2, -1, 1)
    patches = patchify(images, 4)
    condition = student.condition(student.encode(images))
    velocity = student.velocity(s * patches + (1 - s) * noise, t, condition)
    flow = (velocity - (patches - noise)).square().mean()
    states = [[h[:, 1:] for h in model.hidden_states(images)[1:]] for model in (student, teacher)]
    distill, alpha, weights = layerwise_distillation(*states, beta=3.0)

    assert torch.allclose(losses.flow, flow, rtol=1e-5)
    assert torch.allclose(losses.distill, distill, rtol=1e-5)
    assert torch.allclose(losses.total, 0.7 * flow + 0.4 * distill, rtol=1e-5)
    assert torch.allclose(losses.alpha, alpha, atol=1e-6)
    assert torch.allclose(losses.weights, weights, atol=1e-6)
    assert losses.alpha.shape == losses.weights.shape == (2,)
    assert losses.distill > 0


@pytest.mark.parametrize("per_image", [False, True])
def test_chunks_change_nothing(tiny, per_image):
    """Losses and every gradient, of pictures that are no squares too."""
    student = tiny()
    teacher = EncoderTeacher.copy_of(student)
    perturb(student)
    images = torch.randn(3, 3, 8, 24)
    t, noise = torch.rand(3, 12), torch.randn(3, 12, 48)
    results = []
    for chunk_tokens in (None, 8, 8192):
        student.zero_grad()
        losses = UniFlowObjective(student, teacher, chunk_tokens=chunk_tokens)(
            images, t[:, 0] if per_image else t, noise
        )
        (losses.total * 3).backward()
        results.append([losses.flow, *(p.grad for p in student.parameters())])
    for found in results[1:]:
        for ours, theirs in zip(found, results[0], strict=True):
            # float32 sums in another order, and products that PyTorch splits by the number of rows and threads
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1e-3)


def test_uniform_weights(tiny):
    student = tiny()
    objective = UniFlowObjective(student, layer_weights="uniform")
    perturb(student)
    losses = objective(*batch())
    assert torch.equal(losses.weights, torch.tensor([0.5, 0.5]))
    assert torch.allclose(losses.distill, losses.alpha.mean())


def test_layers_are_compared_as_they_come_and_let_go(tiny):
    """When the teacher runs a layer, at most the one before is still there."""
    student = tiny(num_hidden_layers=5)
    objective = UniFlowObjective(student)
    order, alive, most = [], set(), []

    def watch(name, layer):
        def hook(module, inputs, output):
            order.append((name, layer))
            if name == "teacher":
                most.append(len(alive))
                alive.add(layer)
                weakref.finalize(output, alive.discard, layer)

        return hook

    for name, model in (("student", student), ("teacher", objective.teacher)):
        for layer, module in enumerate(model.encoder.layers):
            module.register_forward_hook(watch(name, layer))
    objective(*batch()).total.backward()
    assert order == [(name, layer) for layer in range(5) for name in ("student", "teacher")]
    assert max(most) <= 2


def most_held(objective, images):
    """The most bytes that a call of the objective holds at a time."""
    torch.manual_seed(0)
    with LiveBytes() as live:
        losses = objective(images)
    return live.peak, losses


def test_what_the_objective_holds_does_not_grow_with_the_depth_of_the_teacher(tiny):
    """But by what is handed over all at once."""
    images, held = torch.randn(8, 3, 16, 16), []
    of_layer = 8 * 17 * 64 * 4
    with torch.no_grad():
        for depth in (3, 9):
            objective = UniFlowObjective(tiny(num_hidden_layers=depth, num_decoder_layers=1), chunk_tokens=16)
            held.append(most_held(objective, images)[0])
        # after the encoders nothing is left of them: here it is they that hold the most
        listed = UniFlowObjective(objective.student, objective.teacher.forward, chunk_tokens=16)
        assert most_held(listed, images)[0] > held[1] + 4 * of_layer
    assert held[1] - held[0] < of_layer / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_each_layer_the_smaller_is_kept_for_the_backward_pass(tiny, dtype):
    """The gradient of its distance; or the teacher's features, to the same gradients but for rounding."""
    depth, images = 9, torch.randn(8, 3, 16, 16)
    student = tiny(num_hidden_layers=depth, num_decoder_layers=1)
    teacher = EncoderTeacher.copy_of(student, dtype)
    perturb(student)
    alone, _ = most_held(UniFlowObjective(student, distill_weight=0.0), images)
    beside, losses = most_held(UniFlowObjective(student, teacher), images)
    of_layer = 8 * 17 * 64 * 4
    # the student's own graph holds its layers but for the last
    kept = depth * of_layer if dtype == torch.float32 else depth * of_layer // 2 + of_layer
    assert abs(beside - alone - kept) < of_layer / 10

    losses.total.backward()
    ours = [parameter.grad for parameter in student.parameters()]
    states = [state[:, 1:] for state in student.hidden_states(images)[1:]]
    widened = [feature[:, 1:].float() for feature in teacher(images)[1:]]
    student.zero_grad()
    torch.manual_seed(0)
    flow = UniFlowObjective(student, distill_weight=0.0)(images).total
    (flow + layerwise_distillation(states, widened)[0]).backward()
    for mine, parameter in zip(ours, student.parameters(), strict=True):
        assert (mine - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_a_teacher_with_other_tokens_at_the_front(tiny, prefix):
    """Only the patches' tokens are compared, wherever they lie."""
    student = tiny()
    features = torch.randn(2, 2, 4 + 16, 64)

    class Teacher(torch.nn.Module):
        prefix_tokens = prefix

        def states(self, images):
            yield from features[:, :, 4 - prefix :]

    losses = UniFlowObjective(student, Teacher())(*batch())
    states = [h[:, 1:] for h in student.hidden_states(batch()[0])[1:]]
    _, alpha, _ = layerwise_distillation(states, list(features[:, :, 4:]))
    assert torch.allclose(losses.alpha, alpha, atol=1e-6)


def test_a_teacher_in_bfloat16(tiny):
    student = tiny()
    exact = UniFlowObjective(student)
    rounded = UniFlowObjective(student, EncoderTeacher.copy_of(student, torch.bfloat16))
    perturb(student)
    assert torch.allclose(exact(*batch()).alpha, rounded(*batch()).alpha, rtol=0.05)
    assert next(rounded.teacher.parameters()).dtype == torch.bfloat16


def test_a_lowered_teacher_has_its_layer_scale_in_the_projections(tiny, within_twice):
    """The same function, as good in bfloat16 as the layers as they were; the teacher that was given stays as it is."""
    student = tiny(num_hidden_layers=6)
    images = batch()[0]
    exact = student.double().hidden_states(images.double())
    folded = EncoderTeacher.copy_of(student, torch.float64)
    assert not any(name.endswith((".ls1", ".ls2")) for name in folded.state_dict())
    for ours, theirs in zip(folded(images), exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-13 * theirs.abs().max()

    teacher = EncoderTeacher.copy_of(student.float())
    before = copy.deepcopy(teacher.state_dict())
    lowered = teacher.lowered(torch.bfloat16)
    plain = student.bfloat16().hidden_states(images)
    for found, rounded, state in zip(lowered(images), plain, exact, strict=True):
        assert found.dtype == torch.bfloat16
        within_twice(found, rounded, state)
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_in_fp8(tiny):
    """Its products alone, in whichever dtype it is; the one that was given stays as it is."""
    student = tiny(intermediate_size=128)
    images = batch()[0]
    objective = UniFlowObjective(student)
    given, before = objective.teacher, objective.teacher(images)
    objective.lower_teacher("fp8")
    assert objective.teacher is not given
    assert all(torch.equal(a, b) for a, b in zip(given(images), before, strict=True))
    ours = objective.teacher(images)
    for found, exact in zip(ours[1:], before[1:], strict=True):
        assert 1e-6 < 1 - torch.cosine_similarity(found, exact, dim=-1).mean() < 1e-2
    assert objective(images).alpha.max() < 1e-2
    objective(images).total.backward()
    assert not any(parameter.grad is not None for parameter in objective.teacher.parameters())
    objective.lower_frozen(torch.bfloat16)
    assert objective.teacher.dtype == torch.bfloat16
    assert any(type(part) is Fp8Linear for part in objective.teacher.modules())
    twice = given.lowered(torch.bfloat16, "fp8")(images)
    assert all(torch.equal(a, b) for a, b in zip(objective.teacher(images), twice, strict=True))
    objective.teacher = None
    with pytest.raises(ValueError, match="teacher_precision: expected an EncoderTeacher to teach, got none"):
        objective.lower_teacher("fp8")
    with pytest.raises(ValueError, match="precision: expected one of fp8, got 'int8'"):
        given.lowered(precision="int8")


def test_a_teacher_of_the_transformers_package_in_fp8():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    exact, lowered = (EncoderTeacher.from_pretrained(model, precision=how) for how in (None, "fp8"))
    assert not any(isinstance(part, Fp8Linear) for part in model.modules())
    images = batch()[0]
    for ours, theirs in zip(lowered(images)[1:], exact(images)[1:], strict=True):
        assert 1e-6 < 1 - torch.cosine_similarity(ours, theirs, dim=-1).mean() < 1e-2


def test_a_lowered_teacher_has_no_part_in_autocast(tiny):
    """In which its norms would be made in float32 and cast back."""
    teacher = EncoderTeacher.copy_of(tiny(), torch.bfloat16)
    seen = []
    teacher.encoder.layers[1].norm1.register_forward_hook(lambda *values: seen.append(values[-1].dtype))
    images = batch()[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = [*teacher.states(images), teacher.last(images), teacher(images)[-1]]
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.bfloat16] * 3
    expected = [*teacher.states(images)]
    for ours, theirs in zip(found, [*expected, expected[-1], expected[-1]], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("layers", "message"), [(2, "gives 1 layers, expected"), (4, "gives more layers than")])
def test_a_teacher_of_another_depth(tiny, layers, message):
    with pytest.raises(ValueError, match=f"^teacher: {message} the student's 2"):
        UniFlowObjective(tiny(), lambda images: [torch.ones(2, 17, 64)] * layers)(*batch())


def test_the_teacher_is_the_encoder_as_it_was(tiny):
    student = tiny()
    objective = UniFlowObjective(student)
    images, t, noise = batch()
    assert objective(images, t, noise).distill.abs() < 1e-6
    before = objective.teacher(images)
    perturb(student)
    assert all(torch.equal(a, b) for a, b in zip(before, objective.teacher(images), strict=True))
    assert objective(images, t, noise).distill > 1e-4


def test_the_teacher_stays_frozen_and_in_evaluation_mode(tiny):
    objective = UniFlowObjective(tiny(drop_path_rate=0.5)).train()
    assert objective.student.encoder.training
    assert not objective.teacher.encoder.training
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    objective(*batch()).total.backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_any_teacher_module_will_do(tiny):
    class Constant(torch.nn.Module):
        def forward(self, images):
            return [torch.ones(len(images), 17, 64)] * 3

    losses = UniFlowObjective(tiny(), teacher=Constant())(*batch())
    assert losses.distill > 0.1


def test_without_distillation_there_is_no_teacher(tiny):
    objective = UniFlowObjective(tiny(), distill_weight=0.0)
    assert objective.teacher is None
    losses = objective(*batch())
    assert losses.distill == 0
    assert losses.alpha.shape == losses.weights.shape == (0,)
    assert torch.equal(losses.total.detach(), losses.flow)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("flow_loss", ["flow_matching", "mean_flow"])
def test_where_embeddings_are_made_of_patches_the_images_are_read_once(tiny, monkeypatch, flow_loss, per_image):
    """In half precision: by student, teacher and flow loss, which are the same to rounding as of images."""
    objective = UniFlowObjective(tiny(flow_times=1 + (flow_loss == "mean_flow")), flow_loss=flow_loss)
    perturb(objective.student)
    images, t, noise = batch()
    t = t[:, 0] if per_image else t
    if flow_loss == "mean_flow":
        t = torch.stack([t, t / 2], -1)
    made, read = [], []
    cut = encoder.patchify
    monkeypatch.setattr(encoder, "patchify", lambda *given: made.append(cut(*given)) or made[-1])
    monkeypatch.setattr("uniflow_kernels.ops.patch_embedding.patchify", lambda *given: read.append(1) or cut(*given))
    monkeypatch.setattr("uniflow.flow_decoder.patchify", lambda *given: read.append(1) or cut(*given))
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(objective.student, "patches", lambda images: None)
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(images, t, noise)
        if not whole:
            assert len(made) == 1
            assert made[0].dtype == torch.float32
            assert not read
        weights = (objective.student.embeddings.patch_embedding.weight, objective.student.chal_proj.c_fc.weight)
        found.append((losses.flow, losses.alpha, *torch.autograd.grad(losses.total, weights)))
    assert len(made) == 1
    assert read
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_teacher_does_not_run_beside_a_frozen_encoder(tiny):
    objective, calls = UniFlowObjective(tiny()), []
    objective.teacher.register_forward_hook(lambda *_: calls.append(1))
    taught = objective._taught
    objective._taught = lambda *given: calls.append(1) or taught(*given)
    images, t, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16), torch.randn(2, 16, 48)
    whole = objective(images, t, noise)
    assert calls == [1]
    for name, parameter in objective.student.named_parameters():
        parameter.requires_grad_(not name.startswith(objective.student.pretrained_parts))
    frozen = objective(images, t, noise)
    assert calls == [1]
    assert torch.equal(frozen.flow, whole.flow)
    assert torch.equal(frozen.total, frozen.flow)
    frozen.total.backward()
    with torch.no_grad():  # whoever only looks sees the distance
        assert len(objective(images, t, noise).alpha) == 2
    next(objective.student.encoder.parameters()).requires_grad_()
    objective(images, t, noise)
    assert calls == [1, 1, 1]


def test_a_frozen_encoder_keeps_no_activations(tiny):
    objective, kept = UniFlowObjective(tiny(drop_path_rate=0.5)), []
    for name, parameter in objective.student.named_parameters():
        parameter.requires_grad_(not name.startswith(objective.student.pretrained_parts))

    def count(module, *_):
        kept.append((module, len(saved)))

    saved = []
    for hook in ("register_forward_pre_hook", "register_forward_hook"):
        for layer in (objective.student.embeddings, *objective.student.encoder.layers):
            getattr(layer, hook)(count)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        objective(torch.randn(2, 3, 16, 16))
    assert len(kept) == 6
    assert {already for _, already in kept} == {0}
    assert saved  # of the decoder


def test_recomputing_takes_less_memory_for_the_same_numbers(tiny):
    objective = UniFlowObjective(
        tiny(drop_path_rate=0.3, num_decoder_layers=4, image_size=32).train(), chunk_tokens=None
    )
    images, peaks, found = torch.randn(8, 3, 32, 32), [], []
    for enable, flow_head in ((False, True), (True, False), (True, True)):
        objective.student.gradient_checkpointing_enable(enable, flow_head)
        objective.zero_grad()
        torch.manual_seed(0)
        with LiveBytes() as live:
            objective(images).total.backward()
        peaks.append(live.peak)
        found.append([parameter.grad for parameter in objective.student.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[2] < 0.8 * peaks[1]


def test_t_and_noise_are_drawn_when_not_given(tiny):
    objective = UniFlowObjective(tiny(), t_per="image", t_distribution="uniform")
    images, _, _ = batch()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(objective(images).total.item())
    assert values[0] == values[1] != values[2]


def test_latent_noise_is_added_in_training_alone(tiny):
    """Between 0 and that many deviations of each channel, another share for every picture, and no gradient of it."""
    objective, taken = UniFlowObjective(tiny(latent_noise=0.5, image_size=64), distill_weight=0.0), []
    objective.student.chal_unproj.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    images = torch.randn(3, 3, 64, 64)
    torch.manual_seed(0)
    losses = objective(images)
    clean = objective.student.encode(images)
    added = (taken[0] - clean).detach() / clean.std((0, 1), correction=0)
    amounts = added.std((1, 2))
    assert torch.allclose(added.std(1), amounts[:, None].expand(-1, 8), rtol=0.25)  # all channels of a picture alike
    assert 0 < amounts.min() < amounts.max() < 0.55
    assert len(amounts.unique()) == 3
    by_latents = torch.autograd.grad(losses.total, taken[0])[0]
    assert by_latents.abs().max() > 0

    clean_objective = UniFlowObjective(tiny(image_size=64), distill_weight=0.0)
    clean_objective.student.load_state_dict(objective.student.state_dict())
    totals = []
    for each in (clean_objective, objective.eval()):
        torch.manual_seed(1)
        totals.append(each(images).total)
    assert torch.equal(*totals)  # elsewhere nothing is drawn for it


def test_pictures_of_any_size(tiny):
    assert torch.isfinite(UniFlowObjective(tiny())(torch.randn(2, 3, 8, 24)).total)


def test_pixels_are_normalised(tiny):
    objective = UniFlowObjective(tiny())
    perturb(objective.student)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    _, t, noise = batch()
    found, expected = objective(pixels, t, noise), objective(normalize(pixels), t, noise)
    assert torch.equal(found.total, expected.total)
    assert list(found.measured()) == ["flow", "distill", "alpha", "weights"]
    assert all(torch.equal(found.measured()[name], getattr(expected, name)) for name in found.measured())
    assert not any(value.requires_grad for value in found.measured().values())


def test_bad_options(tiny):
    with pytest.raises(ValueError, match="t_per: expected 'token' or 'image', got 'batch'"):
        UniFlowObjective(tiny(), t_per="batch")
    with pytest.raises(ValueError, match="t_distribution: expected one of"):
        UniFlowObjective(tiny(), t_distribution="normal")
    with pytest.raises(ValueError, match="layer_weights: expected one of adaptive, uniform, got 'mean'"):
        UniFlowObjective(tiny(), layer_weights="mean")


def test_compiles_whole(tiny):
    objective = UniFlowObjective(tiny(num_hidden_layers=1, num_decoder_layers=1))
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    compiled(torch.randn(3, 3, 16, 16))  # another batch size first, t and noise drawn
    results = []
    for function in (compiled, objective):
        objective.student.zero_grad()
        total = function(*batch()).total
        total.backward()
        results.append([total.detach(), *(p.grad for p in objective.student.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("images_dtype", [torch.float64, torch.float32, torch.uint8])
def test_a_student_in_float64(tiny, images_dtype):
    """Losses are float32 whatever the student is; its gradients are in its dtype."""
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    images = images if images_dtype == torch.uint8 else normalize(images).to(images_dtype)
    totals, student = [], tiny()
    for dtype in (torch.float32, torch.float64):
        objective = UniFlowObjective(student.to(dtype), chunk_tokens=8)
        torch.manual_seed(0)
        losses = objective(images)
        losses.total.backward()
        totals.append(losses.total)
        assert losses.total.dtype == torch.float32
        assert all(p.grad.dtype == dtype for p in student.parameters())
        student.zero_grad()
    assert torch.allclose(*totals, rtol=1e-4)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(objective):
    student, teacher = objective.student, objective.teacher
    for part in (*student.encoder.layers, *teacher.encoder.layers, *student.global_blocks, student.flow_head.net):
        fully_shard(part)
    return fully_shard(objective)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, shard])
def test_distributed(process_group, tiny, wrap):
    objective = UniFlowObjective(tiny(), chunk_tokens=8)
    perturb(objective.student)
    wrapped = wrap(copy.deepcopy(objective))
    results = []
    for function in (wrapped, objective):
        for _ in range(2):  # gradients accumulate
            losses = function(*batch())
            losses.total.backward()
        gradients = [p.grad for p in function.parameters() if p.requires_grad]
        results.append([losses.total.detach(), *(getattr(g, "full_tensor", lambda g=g: g)() for g in gradients)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def compare_layers(objective, images, **autocast):
    """The distance, alpha, weights, and the gradients of the student's encoder of the distance and the latents."""
    objective.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        latents, distillation = objective._encode(images, None)
    loss, alpha, weights = distillation.result()
    (loss + latents.float().square().mean()).backward()
    encoder = (objective.student.embeddings, objective.student.encoder)
    gradients = [parameter.grad for part in encoder for parameter in part.parameters()]
    return [loss.detach(), alpha, weights, *gradients]


def exactly(objective, images):
    wide = UniFlowObjective(copy.deepcopy(objective.student).double(), copy.deepcopy(objective.teacher).double())
    return compare_layers(wide, images.double(), enabled=False)


@pytest.fixture
def comparisons(monkeypatch):
    """How often layers were compared by the op that ends a layer, with Triton in its interpreter."""
    pytest.importorskip("triton")
    made, plain = [], transformer.compared_residual_norm
    counted = lambda *of, **how: made.append(1) or plain(*of, **how)  # noqa: E731
    monkeypatch.setattr(transformer, "compared_residual_norm", counted)
    with backend("triton"):
        yield made


@pytest.mark.parametrize("kind", ["float32", "rms", "autocast"])
def test_layers_are_compared_where_they_meet(tiny, within_twice, comparisons, kind):
    """To the numbers of layers that are compared apart; under autocast with a teacher in bfloat16."""
    changes = {"norm_type": "rms_norm", "qk_normalization": True} if kind == "rms" else {}
    student = tiny(num_hidden_layers=3, **changes)
    halved = kind == "autocast"
    objective = UniFlowObjective(student, EncoderTeacher.copy_of(student, torch.bfloat16 if halved else None))
    perturb(student)
    images = batch()[0]
    found = compare_layers(objective, images, enabled=halved)
    assert len(comparisons) == 2
    with backend("eager"):
        plain = compare_layers(objective, images, enabled=halved)
        exact = exactly(objective, images)
    assert len(comparisons) == 2
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        within_twice(mine, theirs, truth.double(), 1e-2 if halved else 2e-6)


class Registers(torch.nn.Module):
    """A teacher with two more tokens at the front."""

    prefix_tokens = 3

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def states(self, images):
        for state in self.teacher.states(images):
            yield torch.cat([state[:, :2], state], 1)


def test_what_keeps_layers_from_being_compared_where_they_meet(tiny, comparisons):
    """Then they are compared apart, to the same gradients but for rounding, and everything fires that is to fire."""
    student = tiny()
    objective = UniFlowObjective(student)
    perturb(student)
    images = batch()[0]
    expected = compare_layers(objective, images, enabled=False)
    assert len(comparisons) == 1

    def apart(objective=objective):
        comparisons.clear()
        found = compare_layers(objective, images, enabled=False)
        assert not comparisons
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1e-3)

    fired = []
    hook = student.encoder.layers[1].norm1.register_forward_hook(lambda *_: fired.append(1))
    apart()
    assert fired == [1]
    hook.remove()
    student.gradient_checkpointing_enable()
    apart()
    student.gradient_checkpointing_enable(False)
    with backend("eager"):
        apart()
    student.encoder.layers[1].compile(backend="eager")
    student.encoder.layers[1]._compiled_call_impl = student.encoder.layers[1]._call_impl
    apart()
    student.encoder.layers[1]._compiled_call_impl = None
    apart(UniFlowObjective(student, Registers(objective.teacher)))
    for layer in student.encoder.layers:
        layer.drop_path2.rate = 1e-9
    objective.train()
    apart()
    objective.eval()
    assert len(compare_layers(objective, images, enabled=False)) == len(expected)
    assert len(comparisons) == 1
    with torch.no_grad():
        comparisons.clear()
        objective._encode(images, None)
    assert not comparisons


def test_layers_that_meet_keep_the_teachers_features_and_no_gradient(tiny, comparisons):
    """In bfloat16 half as much as the gradients in float32 take; and of a frozen copy in float32 as much."""
    student, images = tiny(num_hidden_layers=3), torch.randn(2, 3, 16, 16)

    def held(dtype):
        objective = UniFlowObjective(student, EncoderTeacher.copy_of(student, dtype))
        with LiveBytes() as live:
            made = objective._encode(images, None)
        assert made[1] is not None
        return live.now

    together, halved = held(torch.float32), held(torch.bfloat16)
    assert len(comparisons) == 4
    student.encoder.layers[0].register_forward_hook(lambda *_: None)
    apart, of_layer = held(torch.float32), 2 * 17 * 64 * 4
    assert len(comparisons) == 4
    assert together - apart < of_layer / 2  # two numbers a token, and a few
    assert together - halved > 2 * of_layer // 2 - of_layer / 10

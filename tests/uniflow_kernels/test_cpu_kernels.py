"""The compiled CPU part: every level of instructions, any number of threads, and where its threads come from."""

import multiprocessing
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from uniflow_kernels import backend, cpu_kernels, interpolate, patchify, seeded_noise, stamp, to_images, velocity_loss
from uniflow_kernels.ops.distillation import plain_cosine_distances
from uniflow_kernels.ops.noise import plain_seeded_noise
from uniflow_kernels.ops.velocity import plain_interpolate, plain_velocity_loss
from uniflow_kernels.ops.velocity_definition import pixel_scale_and_shift
from uniflow_kernels.source import Source

pytestmark = pytest.mark.skipif(cpu_kernels.why_not_built() is not None, reason=str(cpu_kernels.why_not_built()))

HALF = [torch.float32, torch.float16, torch.bfloat16]


def levels():
    return [] if cpu_kernels.why_not_built() else cpu_kernels._module().levels()


@pytest.fixture(params=levels(), ids=lambda level: level.name)
def level(request, monkeypatch):
    """Each level of instructions that this processor has."""
    monkeypatch.setattr(cpu_kernels, "_level", lambda: request.param)
    return request.param.name


@pytest.fixture
def threads():
    """Sets torch's number of threads, for the test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [1, 4, 10, 147, 588])
@pytest.mark.parametrize("first_row", [0, 2**33 + 1])
def test_noise_is_that_of_the_definition(level, columns, first_row):
    seeds = torch.tensor([5, 2**62 + 2**40, -1])
    ours = torch.full((60, columns), torch.nan)
    cpu_kernels.seeded_noise(seeds, 2**40 + 1, first_row, ours)
    expected = plain_seeded_noise(60, columns, seeds, 2**40 + 1, torch.device("cpu"), first_row)
    assert (ours - expected).abs().max() < 1e-6


def test_noise_across_the_word_of_a_counter(level):
    """Rows of which the counters' low word ends in the middle of a block."""
    ours = torch.full((64, 4), torch.nan)
    cpu_kernels.seeded_noise(torch.tensor([3]), 0, 2**32 - 13, ours)
    expected = plain_seeded_noise(64, 4, 3, 0, torch.device("cpu"), 2**32 - 13)
    assert (ours - expected).abs().max() < 1e-6


def source(pixels, noise, repeats, patch, layout=torch.channels_last):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 2 * patch, 3 * patch)
    images = torch.randn(shape, generator=generator)
    if pixels == torch.uint8:
        images = torch.randint(256, shape, generator=generator)
    images = images.to(pixels).contiguous(memory_format=layout)
    x0 = torch.randn(2 * repeats, 6, 3 * patch**2 + 3, generator=generator)[..., 3:].to(noise) if noise else None
    return Source(images, x0, None, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 7, 2, 2**40 + 5, patch, repeats)


@pytest.mark.parametrize("written", HALF)
@pytest.mark.parametrize(
    ("pixels", "noise", "repeats", "patch", "layout"),
    [
        (torch.float32, None, 1, 8, torch.channels_last),
        (torch.uint8, torch.float16, 2, 14, torch.channels_last),
        (torch.bfloat16, None, 3, 5, torch.channels_last),
        (torch.float16, torch.bfloat16, 1, 16, torch.channels_last),
        (torch.float32, torch.float32, 1, 1, torch.channels_last),
        (torch.float32, torch.float32, 2, 8, torch.contiguous_format),
        (torch.float32, torch.bfloat16, 1, 14, torch.contiguous_format),
        (torch.float32, None, 1, 16, torch.contiguous_format),
    ],
)
def test_flow_is_that_of_the_definition(level, pixels, noise, repeats, patch, layout, written):
    """x_t, losses and gradient of images of both layouts, a token that does not count, and padded rows."""
    of = source(pixels, noise, repeats, patch, layout)
    batch, tokens, length = of.rows
    generator = torch.Generator().manual_seed(1)
    t, coefficients = torch.rand(2, batch, tokens, generator=generator).unbind()
    velocity = torch.randn(batch, tokens, length + 5, generator=generator).to(written)
    coefficients[0, 1], velocity[0, 1] = 0, torch.nan
    affine = pixel_scale_and_shift(of)
    made = []
    for interpolated, lost in ((cpu_kernels.interpolate, cpu_kernels.velocity_loss), (None, None)):
        x_t, gradient = (torch.full_like(velocity, torch.nan) for _ in range(2))
        losses = torch.full((batch, tokens), torch.nan)
        if interpolated is None:
            plain_interpolate(of, t, x_t)
            plain_velocity_loss(of, velocity, coefficients, gradient, losses)
        else:
            interpolated(of, affine, t, x_t)
            lost(of, affine, velocity, coefficients, gradient, losses)
        made.append((x_t, gradient, losses))
    unit = torch.finfo(written).eps
    for ours, plain in zip(made[0][:2], made[1][:2], strict=True):
        assert ((ours.float() - plain.float()).abs() <= 4e-6 + unit * plain.float().abs()).all()
        assert (ours[..., length:] == 0).all()
    assert torch.allclose(made[0][2], made[1][2], rtol=1e-5)
    assert made[0][2][0, 1] == 0
    assert (made[0][1][0, 1] == 0).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [1, 33, 128])
def test_distances_are_those_of_the_definition(level, dtype, width):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 9, width, generator=generator).to(dtype).unbind()
    student[0, 0, 3], teacher[0, 0, 4] = 0, 0
    made = []
    for compute in (cpu_kernels.cosine_distances, plain_cosine_distances):
        gradients = [torch.full_like(layer, torch.nan) for layer in student]
        powers = torch.ones(2, 3, 9)
        distances = torch.full((2, 3, 7), torch.nan)
        compute(list(student), list(teacher), 2, gradients, powers, distances)
        made.append((distances, torch.stack(gradients).float() / powers[..., None], powers))
    assert (made[0][0] - made[1][0]).abs().max() < 2e-6
    # a norm that is all but a power of two may be one, by the order of its sum
    assert (made[0][2].log2() - made[1][2].log2()).abs().max() <= 1
    assert (made[0][1][:, :, :2] == 0).all()
    scale = 1 / student.float().norm(dim=-1, keepdim=True).clamp(min=1e-8)
    limit = torch.where(scale < 1e7, 4 * torch.finfo(dtype).eps * scale, scale)
    assert ((made[0][1] - made[1][1]).abs() <= limit).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [33, 1000, 5000])
def test_a_token_has_the_same_bits_beside_others(level, dtype, width):
    """Up to eight are taken at once, fewer of wide ones; here with some left over."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 2, 21, width, generator=generator).to(dtype).unbind()
    made = []
    for pieces in (torch.arange(21).split(21), torch.arange(21).split(1)):
        found = []
        for piece in pieces:
            s, t = student[:, :, piece].contiguous(), teacher[:, :, piece].contiguous()
            gradient, distances = torch.full_like(s, torch.nan), torch.full(s.shape[:3], torch.nan)
            powers = torch.full(s.shape[:3], torch.nan) if dtype == torch.float16 else None
            cpu_kernels.cosine_distances(list(s), list(t), 0, list(gradient), powers, distances)
            found.append((distances, gradient, *([] if powers is None else [powers])))
        made.append([torch.cat(parts, 2) for parts in zip(*found, strict=True)])
    assert not any(tensor.isnan().any() for tensor in made[0])
    assert all(map(torch.equal, *made))


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_scaled_as_torch_rounds(level, dtype):
    """By one number and by one a row, across the pieces that threads take, with a tensor of nothing among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 1000), (0, 5, 8), (2, 4097), (7, 3), (2, 3, 4096), (1, 1)]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    rows = [torch.randn(shape[:-1], generator=generator) for shape in shapes]
    rows[2][0] = 1
    for factors in (rows, list(torch.randn(len(shapes), generator=generator))):
        ours = [value.clone() for value in values]
        cpu_kernels.scale(ours, factors)
        for mine, value, factor in zip(ours, values, factors, strict=True):
            by = factor[..., None] if factor.ndim else factor
            assert torch.equal(mine, (value.float() * by).to(dtype))


def test_every_float16_and_roundings_to_all_types(level):
    """Each float16 as float32; and numbers between those of the narrow types, ties among them, as torch rounds them."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    bits = torch.randint(2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).int()
    ties = torch.cat([every.float() * (1 + 2.0**-11), (every.float() + 1.5 * 2.0**-24) / 2, bits.view(torch.float32)])
    ties = torch.cat([ties, -ties, torch.tensor([65519.0, 65520.0, 65535.0, 2.0**-25, 2.0**-24 * 1.5, torch.inf])])
    uneven = torch.tensor([1e-40, torch.nan, 3.3895e38, 3.4028234663852886e38])
    for values, dtypes in ((every, [torch.float32]), (torch.cat([ties, uneven]), HALF)):
        rows = values.view(1, -1, 1)
        for dtype in dtypes:
            images = torch.empty(1, 1, len(values), 1, dtype=dtype)
            cpu_kernels.to_images(rows, None, 1.0, None, 1, False, images)
            assert torch.equal(images.flatten().isnan(), values.isnan())
            assert torch.equal(images.flatten().nan_to_num(), values.to(dtype).nan_to_num())


def test_bytes_are_rounded_as_torch_does(level):
    values = torch.cat([torch.arange(-3, 515) / 510, torch.rand(1000, generator=torch.Generator().manual_seed(0))])
    images = torch.empty(1, 1, len(values), 1, dtype=torch.uint8)
    cpu_kernels.to_images(values.view(1, -1, 1), None, 1.0, None, 1, True, images)
    assert torch.equal(images.flatten(), values.clamp(0, 1).mul(255).round().to(torch.uint8))


def test_the_bits_do_not_depend_on_the_number_of_threads(level, threads):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 56, 84, generator=generator)
    t, velocity = torch.rand(6, 24, generator=generator), torch.randn(6, 24, 588, generator=generator)
    layers = torch.randn(2, 4, 6, 70, 128, generator=generator).unbind()

    def all_of_them():
        made = [seeded_noise(501, 147, 3), interpolate(images, t, 14, seed=1), patchify(images, 14)]
        losses, gradient = torch.empty(6, 24), torch.empty_like(velocity)
        of = Source(images, None, None, None, None, 1, 0, 0, 14)
        cpu_kernels.velocity_loss(of, None, velocity, 0.5, gradient, losses)
        distances, gradients = torch.empty(4, 6, 70), [torch.empty_like(layer) for layer in layers[0]]
        cpu_kernels.cosine_distances(list(layers[0]), list(layers[1]), 0, gradients, None, distances)
        products = [layer.clone() for layer in gradients]
        cpu_kernels.scale(products, distances.sum((1, 2)).unbind())
        pictures = to_images(velocity, 14, (56, 84), dtype=torch.uint8)
        return [*made, losses, gradient, distances, *gradients, *products, pictures]

    threads(1)
    expected = all_of_them()
    for number in (2, 3, 7):
        threads(number)
        for ours, theirs in zip(all_of_them(), expected, strict=True):
            assert torch.equal(ours, theirs)


def noise_of_a_child(results, threads):
    torch.set_num_threads(threads)
    results.put(seeded_noise(600, 588, 1).numpy().tobytes())  # torch's own loops would wait


def test_a_child_of_fork_works_by_itself(threads):
    """It has none of the threads that its parent had started, and must not wait for them."""
    threads(2)
    expected = seeded_noise(600, 588, 1)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: this process has threads
        child = context.Process(target=noise_of_a_child, args=(results, 2), daemon=True)
        child.start()
    found = results.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    assert found == expected.numpy().tobytes()
    assert torch.equal(seeded_noise(600, 588, 1), expected)


def test_it_needs_no_torch_to_be_imported():
    program = (
        "import sys, importlib.util as u; spec = u.spec_from_file_location('_cpu', sys.argv[1])\n"
        "cpu = u.module_from_spec(spec); spec.loader.exec_module(cpu)\n"
        "print([level.name for level in cpu.levels()], 'torch' in sys.modules)"
    )
    origin = cpu_kernels._module().__file__
    done = subprocess.run([sys.executable, "-c", program, origin], capture_output=True, text=True, check=False)
    assert done.stdout == f"{[level.name for level in levels()]} False\n", done.stderr


def test_whoever_looks_on_sees_what_is_done():
    """A mode and a trace see operators, where the compiled part would give them constants."""
    images = torch.randn(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: patchify(x, 4) + interpolate(x, torch.ones(1), 4, seed=1), images)
    other = torch.randn(1, 3, 8, 8)
    assert torch.allclose(traced(other), 2 * patchify(other, 4), atol=1e-6)
    assert torch.equal(torch.func.vmap(lambda x: patchify(x, 4))(images[None]), patchify(images, 4)[None])
    primal, tangent = torch.func.jvp(lambda x: patchify(x, 4), (images,), (images,))
    assert torch.equal(primal, tangent)


def test_numbers_that_are_stored_negated_or_conjugated():
    turned = torch.randn(1, 3, 8, 8, dtype=torch.complex64)
    assert torch.equal(patchify(turned.conj(), 4), patchify(turned, 4).conj())
    negated = turned.conj().imag
    assert negated.is_neg()
    assert torch.equal(patchify(negated, 4), -patchify(turned.imag, 4))
    t, velocity = torch.ones(1), torch.zeros(1, 4, 48)
    assert torch.equal(interpolate(negated, t, 4, seed=1), interpolate(negated.clone(), t, 4, seed=1))
    assert torch.allclose(velocity_loss(velocity, negated, 4, seed=1), velocity_loss(velocity, -turned.imag, 4, seed=1))
    assert torch.equal(to_images(patchify(negated, 4), 4), negated)


def test_what_it_cannot_serve_is_said():
    with backend("cpu"):
        with pytest.raises(ValueError, match=r"interpolate: backend 'cpu' cannot serve .* not torch.float64"):
            interpolate(torch.zeros(1, 3, 8, 8, dtype=torch.float64), torch.ones(1), 4, seed=1)
        with pytest.raises(ValueError, match="to_images: backend 'cpu' cannot serve this input: it takes"):
            to_images(torch.zeros(1, 4, 48, dtype=torch.float64), 4)
        with pytest.raises(ValueError, match="patchify: backend 'cpu' cannot serve this input: it runs on CPUs"):
            patchify(torch.zeros(1, 3, 8, 8, device="meta"), 4)


def test_what_is_not_built_is_said(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_is_built", lambda: False)
    assert "not built" in cpu_kernels.why_not_built()
    with backend("cpu"), pytest.raises(ValueError, match=r"seeded_noise: backend 'cpu' .* was not built"):
        seeded_noise(1, 4, 1)
    assert seeded_noise(1, 4, 1).shape == (1, 4)


def test_a_part_of_other_sources_is_not_used(monkeypatch, tmp_path):
    """What an older csrc/ was made into lacks what Python calls; an installation has no csrc/."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stamp.is_current("_cpu")
        assert not stamp.is_current("_absent")
    monkeypatch.setattr(cpu_kernels._module(), "SOURCES", "s0", raising=False)
    with pytest.warns(UserWarning, match=r"_cpu is not used: .*: python setup.py build_ext --inplace"):
        assert not stamp.is_current("_cpu")
    monkeypatch.setattr(stamp, "CSRC", tmp_path)
    assert stamp.is_current("_cpu")


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_a_stamp_follows_what_is_compiled(monkeypatch, tmp_path, name):
    shutil.copytree(stamp.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(stamp, "CSRC", tmp_path / "csrc")
    before = stamp.stamp(name)
    for changed in ("sums.h", "cpu/kernels.cpp" if name == "_cpu" else "velocity.cu"):
        (tmp_path / "csrc" / changed).open("a").write("// another")
        assert stamp.stamp(name) != before
        before = stamp.stamp(name)
    (tmp_path / "csrc" / ("velocity.cu" if name == "_cpu" else "cpu/kernels.cpp")).unlink()
    assert stamp.stamp(name) == before


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif({level.name for level in levels()} == {"baseline"}, reason="needs levels of x86")
def test_loops_are_vector_instructions_of_their_level():
    """In every function that does the work; and outside a level's own code are none that a lesser processor lacks."""
    done = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", cpu_kernels._module().__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    codes = {}
    for part in re.split(r"^[0-9a-f]+ <(?=.*>:$)", done.stdout, flags=re.MULTILINE)[1:]:
        name, code = part.split(">:\n", 1)
        codes[name] = codes.get(name, "") + code
    for name, code in codes.items():
        level = next((level for level in ("avx2", "avx512") if f"uniflow_cpu::{level}::" in name), None)
        assert level == "avx512" or "%zmm" not in code, name
        assert level or "%ymm" not in code, name
    expected = {
        "noise": ("vpmul(ud|l)q", "vfm", "vsqrtps"),
        "interpolate": ("vfm",),
        "loss": ("vfm",),
        "finish": ("vfm",),
        "distances": ("vfm",),
        "scale": ("vmulps",),
    }
    for level, register in (("avx2", "%ymm"), ("avx512", "%zmm")):
        own = f"uniflow_cpu::{level}::(anonymous namespace)::"
        block = next(code for name, code in codes.items() if name.startswith(f"{own}normals_of_block("))
        for function, instructions in expected.items():
            code = next(code for name, code in codes.items() if name.startswith(f"{own}{function}("))
            code += block if function == "noise" else ""
            for instruction in instructions:
                assert re.search(rf"{instruction}\S*\s.*{register}", code), (level, function, instruction)

"""The emulator on small kernels whose results are known, and on wrong ones that it must find."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx.launch import emulated
from tests.ptx.machine import EmulationError, Options
from tests.ptx.tma import TensorMap, TensorMapError

both = pytest.mark.parametrize("arch", [80, 90])
orders = pytest.mark.parametrize("early", [False, True])


@triton.jit
def softmax(x_p, y_p, n, stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_p + row * stride + column, column < n, -float("inf"))
    x = tl.exp(x - tl.max(x, 0))
    tl.store(y_p + row * stride + column, x / tl.sum(x, 0), column < n)


@triton.jit
def by_pointers(a_p, b_p, c_p, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_p + m[:, None] * am + k[None, :] * ak, (m[:, None] < M) & (k[None, :] < K), 0.0)
        b = tl.load(b_p + k[:, None] * bk + n[None, :] * bn, (k[:, None] < K) & (n[None, :] < N), 0.0)
        total = tl.dot(a, b, total)
    tl.store(c_p + m[:, None] * N + n[None, :], total, (m[:, None] < M) & (n[None, :] < N))


@triton.jit
def by_tma(a_p, b_p, c_p, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        b = b_p.load([n, k]).T if TURNED else b_p.load([k, n])
        total = tl.dot(a_p.load([m, k]), b, total)
    c_p.store([m, n], total.to(tl.bfloat16))


@triton.jit
def copy(x_p, y_p, n, FROM: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_p + place, tl.load(x_p + FROM + place, place < n), place < n)


@both
def test_softmax(arch):
    x = torch.randn(13, 300)
    y = torch.empty_like(x)
    with emulated(arch, Options(races=True)) as seen:
        softmax[(13,)](x, y, 300, 300, BLOCK=512)
    torch.testing.assert_close(y, x.softmax(1))
    assert not seen.findings


@both
@orders
@pytest.mark.parametrize(("dtype", "turn_a", "turn_b"), [(torch.bfloat16, False, True), (torch.float16, True, False)])
def test_product_by_pointers(arch, early, dtype, turn_a, turn_b):
    a, b, c = torch.randn(150, 104).to(dtype), torch.randn(104, 136).to(dtype), torch.empty(150, 136)
    x = a.T.contiguous().T if turn_a else a
    y = b.T.contiguous().T if turn_b else b
    with emulated(arch, Options(races=True, early=early)) as seen:
        by_pointers[(3, 3)](x, y, c, 150, 136, 104, *x.stride(), *y.stride(), BM=64, BN=64, BK=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-4, atol=1e-4)
    assert not seen.findings


@orders
@pytest.mark.parametrize(
    ("turned", "columns", "depth", "warps"),
    [(False, 64, 64, 4), (True, 256, 64, 8), (False, 128, 32, 4), (True, 32, 16, 4)],
)
def test_product_by_tma(early, turned, columns, depth, warps):
    a, b, c = torch.randn(200, 136).bfloat16(), torch.randn(136, 264).bfloat16(), torch.zeros(200, 264).bfloat16()
    given = b.T.contiguous() if turned else b
    described = TensorDescriptor.from_tensor
    with emulated(90, Options(races=True, early=early)) as seen:
        by_tma[(2, -(-264 // columns))](
            described(a, [128, depth]),
            described(given, [columns, depth] if turned else [depth, columns]),
            described(c, [128, columns]),
            136, BM=128, BN=columns, BK=depth, TURNED=turned, num_warps=warps,
        )  # fmt: skip
    torch.testing.assert_close(c, (a.float() @ b.float()).bfloat16(), rtol=2e-2, atol=2e-2)
    assert not seen.findings


@triton.jit
def column_sums(x_p, y_p, rows, columns, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_p + row * columns + column, (row < rows) & (column < columns), 0.0)
    tl.store(y_p + tl.arange(0, BLOCK), tl.sum(x, 0), tl.arange(0, BLOCK) < columns)


@both
def test_column_sums(arch):
    x, y = torch.randn(50, 61), torch.empty(61)
    with emulated(arch, Options(races=True)) as seen:
        column_sums[(1,)](x, y, 50, 61, BLOCK=64)
    torch.testing.assert_close(y, x.sum(0), rtol=1e-5, atol=1e-5)
    assert not seen.findings


@both
def test_what_lies_outside_every_allocation(arch):
    x, y = torch.zeros(1000), torch.zeros(1024)
    with emulated(arch), pytest.raises(EmulationError, match="in no allocation"):
        copy[(1,)](x, y, 1024, FROM=0, BLOCK=1024)


@both
def test_what_lies_outside_the_arguments(arch):
    x, y = torch.zeros(4, 256)[:, :128], torch.zeros(256)
    with emulated(arch) as seen:
        copy[(1,)](x, y, 256, FROM=0, BLOCK=256)
    assert "global read outside every argument's elements" in {finding.kind for finding in seen.findings.values()}


@both
def test_blocks_that_race(arch):
    x = torch.zeros(1024)
    with emulated(arch, Options(races=True)) as seen:
        copy[(2,)](x, x, 512, FROM=256, BLOCK=256)
    assert any("global memory race" in finding.kind for finding in seen.findings.values())


@both
def test_a_pointer_that_is_not_as_aligned_as_it_was_compiled_for(arch):
    x, y = torch.arange(520.0), torch.zeros(512)
    with emulated(arch):
        copy[(1,)](x[1:513], y, 512, FROM=0, BLOCK=512)
        assert torch.equal(y, x[1:513])
        compiled = next(iter(copy.device_caches[arch][0].values()))
        assert compiled.metadata.target.arch == arch


def test_a_tensor_map_that_the_driver_refuses():
    TensorMap(1 << 20, 2, (64, 10), (2, 128), (64, 8), 3)
    for wrong in (
        {"base": (1 << 20) + 8},
        {"strides": (2, 136)},
        {"box": (128, 8)},
        {"box": (64, 512)},
        {"sizes": (64, 0)},
    ):
        with pytest.raises(TensorMapError):
            TensorMap(
                **{
                    "base": 1 << 20,
                    "item": 2,
                    "sizes": (64, 10),
                    "strides": (2, 128),
                    "box": (64, 8),
                    "swizzle": 3,
                    **wrong,
                }
            )

"""Launches through kept kernels beside Triton's own, on a driver and a compiler that only write down what is asked.

Runs as a process of its own, as `compiling` does, and prints for each check what it failed with, or nothing:

    python -m tests.compile.launching
"""

from __future__ import annotations

import gc
import json
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from uniflow_kernels.ops.velocity import source_of
from uniflow_kernels.triton_kernels import (
    activation,
    compared_norm,
    distillation,
    dual_activation,
    dual_norm,
    flow_head,
    flow_products,
    images,
    launch,
    layer_products,
    noise,
    patches,
    products,
    quantization,
    velocity,
)
from uniflow_kernels.triton_kernels.launch import Launch

CHECKS: dict[str, Callable[[], None]] = {}


class Metadata(NamedTuple):
    """What Triton knows of a compiled kernel, as far as its launchers ask."""

    target: Any
    tensordesc_meta: list[dict[str, Any]] | None


class Compiled:
    """What stands for a compiled kernel."""

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        way = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "fp4_padded": False}
        described = [kind for kind in source.signature.values() if str(kind).startswith("tensordesc")]
        ways = [{**way, "block_size": [number]} for number in range(len(described))]  # so that no two are the same
        self.src, self.options, self.metadata = source, options, Metadata(driver.active.get_current_target(), ways)
        self.function, self.packed_metadata = object(), object()
        self.run = Launcher(source, self.metadata)

    def launch_metadata(self, *of: Any) -> None:
        return None


class Launcher:
    """What stands for Triton's launcher: descriptors are encoded as there, and what is launched is written down."""

    launched: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, source: Any, metadata: Metadata) -> None:
        self.kinds, self.ways = list(source.signature.values()), metadata.tensordesc_meta

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
        _, enter, _, *arguments = rest
        if enter is not None:
            enter()
        flat: list[Any] = []
        ways = iter(self.ways or [])
        for kind, value in zip(self.kinds, arguments, strict=True):
            parts = launch._encode(value, next(ways)) if str(kind).startswith("tensordesc") else [value]
            flat += map(_plain, parts)
        self.launched.append(((x, y, z), stream, function, packed, flat))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):  # of tensors, or of their addresses, which a kept launch hands over
        return [each.data_ptr() if isinstance(each, Tensor) else each for each in value]
    return value.data_ptr() if isinstance(value, Tensor) else (type(value).__name__, value)


class Driver:
    """What stands for Triton's driver, on a device of any number."""

    launcher_cls = Launcher

    def __init__(self, device: int) -> None:
        self.device, self.utils = device, self
        self.fill_tma_descriptor = self.fill_tma_descriptor_tiled = lambda *of: ("map", *of)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


_devices = iter(range(100, 10**6))


@contextmanager
def driven(device: int | None = None) -> Iterator[Driver]:
    """On a device of its own, whose kernels nobody has compiled."""
    before, compile_ = driver._active, triton.compiler.compile
    active = Driver(next(_devices) if device is None else device)
    driver.set_active(active)
    triton.compiler.compile = lambda src, target, options, **_: Compiled(src, options)
    Launcher.launched.clear()
    try:
        yield active
    finally:
        driver._active, triton.compiler.compile = before, compile_


@contextmanager
def compared() -> Iterator[list[str]]:
    """Every launch is made twice, and once more as Triton does it: the last two must be the same.

    Gives the names of what was launched, those through a kept kernel marked "kept".
    """
    seen: list[str] = []
    plain = Launch.__call__

    def thrice(self: Launch, grid: Any, describe: Any = None, /, **arguments: Any) -> None:
        plain(self, grid, describe, **arguments)
        asked: list[Any] = []
        own = self._as_triton_does
        self._as_triton_does = lambda *of: asked.append(own(*of))  # type: ignore[method-assign]
        try:
            Launcher.launched.clear()
            plain(self, grid, describe, **arguments)
        finally:
            del self._as_triton_does
        own(grid, describe, arguments)
        kept, public = Launcher.launched
        assert kept == public, f"{self.kernel.__name__}: {kept} is not {public}"
        seen.append(f"{self.kernel.__name__}{'' if asked else ', kept'}")

    Launch.__call__ = thrice  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Launch.__call__ = plain  # type: ignore[method-assign]


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def of(*shape: int, dtype: torch.dtype = torch.bfloat16, offset: int = 0, extra: int = 0) -> Tensor:
    """Zeros, `offset` elements from where memory begins, with `extra` elements between rows."""
    *rows, width = shape
    number = torch.Size(rows).numel() * (width + extra)
    return torch.zeros(number + offset, dtype=dtype)[offset:].view(*rows, width + extra)[..., :width]


def all_launches(rows: int, width: int, dtype: torch.dtype, offset: int = 0, extra: int = 0) -> None:
    """Every launch function of the package once or more."""

    def matrix(*shape: int) -> Tensor:
        return of(*shape, dtype=dtype, offset=offset, extra=extra)

    def vector(size: int) -> Tensor:
        return of(size, dtype=dtype, offset=offset)

    which = flow_head.Rows(rows, rows, 1)
    x, q, h, total, dh = (matrix(rows, width) for _ in range(5))
    modulation, dmodulation = matrix(rows, 3 * width), matrix(rows, 3 * width)
    shift, scale, gate = modulation.split(width, 1)
    dshift, dscale, dgate = dmodulation.split(width, 1)
    for norm in ((vector(width), vector(width)), (vector(width), None), (None, None)):
        for rms in (True, False):
            flow_head.norm_modulate(x, (gate, q), norm, (shift, scale), total, h, which, rms, 1e-6)
            flow_head.norm_modulate(x, None, norm, None, None, h, which, rms, 1e-5)
            flow_head.norm_modulate_backward(
                dh, total, x, (gate, q), norm, scale, (dshift, dscale), dgate, which, rms, 1e-6
            )
            flow_head.norm_modulate(x, (None, q), norm, None, total, h, which, rms, 1e-5)
            for_all = flow_head.Rows(rows, 1, rows)
            flow_head.norm_modulate_backward(dh, None, x, None, norm, None, None, None, for_all, rms, 1e-6)
            flow_head.norm_modulate(x, (gate[:1], q), norm, None, total, h, for_all, rms, 1e-5)
            flow_head.norm_modulate_backward(
                dh,
                total,
                x,
                (gate[:1], q),
                norm,
                None,
                None,
                dgate if for_all.per_row else None,
                for_all,
                rms,
                1e-6,
                dx=h,
            )
    found, coefficients, number = torch.zeros(rows), torch.zeros(rows, 2), torch.zeros(())
    for scale_and_norm in ((vector(width), vector(width), vector(width)), (None, vector(width), None)):
        of_layer, *of_norm = scale_and_norm
        rms, branch = of_layer is None, None if of_layer is None else q
        compared_norm.compared_norm(
            x, of_layer, q, tuple(of_norm), matrix(rows, width), rows, 1, total, h, found, coefficients, rms, 1e-6
        )
        for arriving in (total, None):
            compared_norm.compared_norm_backward(
                dh,
                arriving,
                number,
                0.5,
                x,
                of_layer,
                branch,
                tuple(of_norm),
                matrix(rows, width),
                coefficients,
                h,
                branch,
                rms,
                1e-6,
            )
    for p in (matrix(rows, width), matrix(rows, 2 * width)):
        activation.activation(p, width)
        activation.activation_backward(matrix(rows, width), p)
    quantization.quantize(x, 448.0, 1e-38)
    _duals(x, q, h, total, dh, (shift, dshift), (scale, dscale), (gate, dgate), vector(width))
    for kind in (dtype, torch.float32):
        _pixels(rows, kind, offset)


def _duals(
    x: Tensor,
    q: Tensor,
    h: Tensor,
    total: Tensor,
    dh: Tensor,
    shift: tuple[Tensor, Tensor],
    scale: tuple[Tensor, Tensor],
    gate: tuple[Tensor, Tensor],
    vector: Tensor,
) -> None:
    """Values with tangents, which lie in the same memory here."""
    none, all_of_them = dual_norm.Vectors(), dual_norm.Vectors(*[vector] * 6)
    residual, made = (gate, (q, h)), ((h, q), (dh, h))
    for rms, vectors in ((True, none), (False, all_of_them)):
        dual_norm.dual_norm((x, q), residual, (shift, scale), vectors, (total, h), (dh, h), rms, 1e-6)
        dual_norm.dual_norm((x, q), None, None, vectors, None, (dh, h), rms, 1e-6)
        dual_norm.dual_norm_backward(
            (dh, h), (total, q), (x, q), residual, scale, vectors, (h, q), made, (dh, h), rms, 1e-6
        )
        dual_norm.dual_norm_backward((dh, h), None, (x, q), None, None, vectors, (h, q), None, None, rms, 1e-6)
    for bias in (vector, None):
        dual_activation.dual_activation((x, q), bias, (h, dh))
        dual_activation.dual_activation_backward((dh, h), (x, q), bias, (h, total))
        dual_activation.dual_activation_backward((dh, None), (x, None), bias, (h, None))


def _pixels(rows: int, dtype: torch.dtype, offset: int) -> None:
    patch = 3
    pictures = of(1, 3, patch, patch * rows, dtype=dtype, offset=offset)
    cut, out = (of(1, rows, 3 * patch**2, dtype=dtype, offset=offset) for _ in range(2))
    affine, t, losses = torch.zeros(3, 2), torch.zeros(1, rows), torch.zeros(1, rows)
    patches.patchify(pictures, cut, patch)
    patches.unpatchify(cut, pictures, patch)
    for first in (0, 2**33):
        noise.seeded_noise(torch.zeros(1, dtype=torch.int64), 2**40 + 1, first, torch.zeros(rows, 27))
    images.to_images(cut, out, 0.25, affine, patch, True, pictures)
    images.to_images(cut, None, 1.0, None, patch, False, pictures.to(torch.uint8))
    for seed, given in ((1, None), (2**62 + 5, None), (torch.zeros((), dtype=torch.int64), None), (None, out)):
        source = source_of(pictures, patch, given, seed, 0, 0, None, None, repeats=1)
        velocity.interpolate(source, affine, t, out)
        velocity.velocity_loss(source, None, cut, 0.5, None, losses)
        velocity.velocity_loss(source, affine, cut, losses, out, losses)
    layers = [of(1, rows + 1, 16, dtype=dtype, offset=offset) for _ in range(3)]
    distillation.cosine_distances(layers, layers, 1, [], None, torch.zeros(3, 1, rows))
    distillation.cosine_distances(layers, layers, 1, layers, torch.zeros(3, 1, rows + 1), torch.zeros(3, 1, rows))
    distillation.scale(cut, torch.zeros(()))


def all_products(rows: int, width: int, extra: int = 0, arch: int = 90) -> None:
    """The products' launches, kept results and biases there or not."""
    before = products.architecture
    products.architecture = lambda device: arch
    try:
        for dtype in (torch.bfloat16, torch.float16):
            _products(rows, width, dtype, extra)
    finally:
        products.architecture = before


def _products(rows: int, width: int, dtype: torch.dtype, extra: int) -> None:
    def matrix(*shape: int) -> Tensor:
        return of(*shape, dtype=dtype, extra=extra)

    x, a, h, u, total, gate, q, dq = (matrix(rows, width) for _ in range(8))
    vector = of(width, dtype=dtype)
    moments = products.moments(x, False)
    for bias in (None, of(3 * width, dtype=dtype)):
        side = None if bias is None else bias[:width]
        for kept in (None, q):
            layer = matrix(3 * width, width), bias
            flow_products.modulated(x, moments, a, layer, (vector, None), h, kept, False, False, 1e-6)
            flow_products.up(h, (matrix(width, width), side), u, kept)
            flow_products.up(h, (matrix(2 * width, width), side), u, None if kept is None else matrix(rows, 2 * width))
            square = matrix(width, width), side
            flow_products.down(x, a, layer, u, square, total, kept, None if kept is None else gate, True)
    for p in (matrix(rows, width), matrix(rows, 2 * width)):
        flow_products.down_backward(dq, matrix(width, width), p)
    flow_products.down_backward(dq, matrix(width, width), matrix(rows, width), activation="gelu")
    for sums, side in ((torch.zeros(width), torch.zeros(width)), (None, None)):
        rms = sums is None
        layer_products.fold_norm((vector, None if rms else vector), (matrix(width, width), None if rms else vector))
        layer_products.folded_norm(x, moments, matrix(width, width), sums, side, "gelu", rms, 1e-6)
        bias = None if rms else vector
        layer_products.residual_product(a, (matrix(width, width), bias), bias, x, None if rms else False)
        layer_products.activated_product(x, (matrix(width, width), bias), "gelu")
        layer_products.residual_product(a, (matrix(width, width), bias), None, of(3, width, dtype=dtype), None)


@check
def every_launch_is_the_same_as_tritons() -> None:
    with driven(), compared() as seen:
        for rows in (1, 16, 17):
            for dtype in (torch.bfloat16, torch.float32):
                for width, extra in ((16, 0), (17, 0), (16, 3)):
                    all_launches(rows, width, dtype, extra=extra)
            for extra in (0, 8):
                all_products(rows, 64, extra)
                all_products(rows, 64, extra, arch=80)
    launches = {name.removesuffix(", kept") for name in seen}
    assert len(launches) == 26, launches  # every kernel of the package
    assert {f"{name}, kept" for name in launches} <= set(seen), seen


@check
def what_is_not_aligned_is_launched_by_triton() -> None:
    with driven(), compared() as seen:
        all_launches(4, 16, torch.bfloat16)  # kept now for pointers that are aligned
        seen.clear()
        all_launches(4, 16, torch.bfloat16, offset=1)
    rows = [name for name in seen if name.startswith(("norm", "activation"))]
    assert rows
    assert not any("kept" in name for name in rows), rows
    with driven(), compared() as seen:
        all_launches(4, 16, torch.bfloat16, offset=8)  # 16 bytes
    assert all("kept" in name for name in seen if name.startswith(("norm", "activation")))


@check
def a_device_has_kernels_of_its_own() -> None:
    functions = set()
    for device in (next(_devices), next(_devices)):
        with driven(device):
            for _ in range(2):
                activation.activation(of(4, 16), 16)
            first, second = Launcher.launched
            assert first[:4] == second[:4]
            assert first[1] == 7 + device
            functions.add(id(first[2]))
    assert len(functions) == 2


@check
def another_driver_on_the_same_device_is_another() -> None:
    with driven() as active:
        activation.activation(of(4, 16), 16)
        activation.activation(of(4, 16), 16)
        device = active.device
    with driven(device), compared() as seen:
        activation.activation(of(4, 16), 16)
    assert seen == ["activation_kernel, kept"]


@check
def memory_that_is_freed_and_taken_again_is_described_as_it_is_now() -> None:
    """The same address with other strides, another shape, another dtype; and a tensor is not kept alive."""
    block = torch.zeros(2 * 64 * 80, dtype=torch.bfloat16)
    with driven(), compared() as launched:
        for rows, stride in ((64, 64), (64, 80), (32, 64), (32, 80), (64, 64)):
            x = block[: rows * stride].view(rows, stride)[:, :64]
            others = [of(rows, 64) for _ in range(2)]
            products.architecture, before = (lambda device: 90), products.architecture
            try:
                flow_products.up(x, (of(64, 64), None), others[0], others[1])
            finally:
                products.architecture = before
    assert launched == ["up_kernel, kept"] * 5
    tensor = of(64, 64)
    seen = weakref.ref(tensor)
    with driven():
        for _ in range(2):
            activation.activation(tensor, 64)
    Launcher.launched.clear()
    del tensor
    gc.collect()
    assert seen() is None


@check
def an_integer_for_a_float_makes_no_kernel_of_its_own() -> None:
    x, h, which = of(4, 16), of(4, 16), flow_head.Rows(4, 4, 1)
    made = set()
    with driven(), compared() as seen:
        for eps in (0, 1, 1e-6, 1.0, 0.0, 16):
            flow_head.norm_modulate(x, None, (None, None), None, None, h, which, True, eps)
            made.add(Launcher.launched[-1][2])
        assert seen == ["norm_modulate_kernel, kept"] * 6
    assert len(made) == 1


@check
def what_is_kept_is_bounded() -> None:
    with driven():
        for size in range(launch._MOST_KEPT + 20):
            distillation.scale(torch.zeros(size + 2), torch.zeros(()))
        assert len(distillation._launch_scale.kept) <= launch._MOST_KEPT


@check
def whoever_watches_sees_every_launch() -> None:
    told = []

    def hook(*of: Any) -> None:
        told.append(1)

    with driven():
        activation.activation(of(4, 16), 16)
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            activation.activation(of(4, 16), 16)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert len(told) == 1
        before = knobs.runtime.launch_enter_hook
        knobs.runtime.launch_enter_hook = hook
        try:
            activation.activation(of(4, 16), 16)
        finally:
            knobs.runtime.launch_enter_hook = before
        assert len(told) == 2
        activation.activation(of(4, 16), 16)
        assert len(told) == 2


@check
def an_unknown_triton_launches_by_itself() -> None:
    known = launch._KNOWN
    launch._KNOWN = False
    try:
        unknown = Launch(activation.activation_kernel)
    finally:
        launch._KNOWN = known
    kept, activation._launch = activation._launch, unknown
    try:
        with driven(), compared() as seen:
            activation.activation(of(4, 16), 16)
        assert seen == ["activation_kernel"]
    finally:
        activation._launch = kept


@check
def threads_launch_at_once() -> None:
    failed: list[BaseException] = []

    def many(width: int) -> None:
        try:
            for rows in (1, 16, 17, 4):
                for _ in range(20):
                    p = of(rows, width)
                    u = activation.activation(p, width)
                    mine = [each for each in list(Launcher.launched) if p.data_ptr() in each[4][:1]]
                    assert any(each[4][1] == u.data_ptr() for each in mine)
        except BaseException as error:
            failed.append(error)

    with driven():
        threads = [threading.Thread(target=many, args=(width,)) for width in (16, 24, 32, 17)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed


def main() -> None:
    said = {}
    for name, function in CHECKS.items():
        try:
            function()
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()[-4000:]
    print(json.dumps(said))


if __name__ == "__main__":
    main()

"""What the fused flow blocks launch over all rows, counted from their shapes: the work that a roofline is drawn from.

A launch reads each of its operands once and writes each of its results once. Left out are biases, norm weights, partial
sums over rows and the launches that add them up: a forward pass is whole, a backward pass has more launches than these.
"""

from __future__ import annotations

from typing import NamedTuple

PART = 64  # columns whose moments the products write together, in the tiles of every GPU


class Launch(NamedTuple):
    """One launch: bytes read and written, and FLOPs of its product if it is one."""

    name: str
    read: int
    written: int
    flops: int = 0


def _add(launch: Launch, read: int = 0, written: int = 0, flops: int = 0) -> Launch:
    return Launch(launch.name, launch.read + read, launch.written + written, launch.flops + flops)


class Shape(NamedTuple):
    """Blocks of width W and hidden size H over R rows, each row with a condition and each block with a modulation."""

    rows: int
    width: int
    hidden: int
    depth: int
    gated: bool = False  # SwiGLU
    final: bool = True  # the last norm is modulated
    itemsize: int = 2

    def launch(self, name: str, read: int, written: int, inner: int = 0, outer: int = 0) -> Launch:
        """A launch that reads and writes so many elements a row, with a product [R, inner] by [inner, outer]."""
        rows, weight = self.rows, inner * outer
        return Launch(name, self.itemsize * (rows * read + weight), self.itemsize * rows * written, 2 * rows * weight)

    def moments(self, columns: int) -> int:
        """Bytes of two float32 moments a row for every so many columns."""
        return 8 * self.rows * -(-self.width // columns)

    def weight_gradient(self, inner: int, outer: int) -> Launch:
        """The product [outer, R] by [R, inner]."""
        rows, weight = self.rows, inner * outer
        return Launch(
            "weight gradient", self.itemsize * rows * (inner + outer), self.itemsize * weight, 2 * rows * weight
        )


def forward(shape: Shape, path: str, keep: str = "nothing") -> list[Launch]:
    """The launches of a forward pass between `input_proj` and `final_layer.linear`, behind SiLU(y).

    Args:
        shape: of the blocks.
        path: "rows" or "products".
        keep: "nothing" for inference; what is kept for a backward pass: "all", "no gate" or "inputs".
    """
    return _forward_by_rows(shape, keep) if path == "rows" else _forward_by_products(shape, keep)


def _forward_by_rows(shape: Shape, keep: str) -> list[Launch]:
    w, h = shape.width, shape.hidden
    p = 2 * h if shape.gated else h
    # shift, scale and gate in one product, or the gate in one of its own where it is not kept
    parts = (2 * w, w) if keep == "no gate" else (3 * w,)
    launches = []
    for i in range(shape.depth):
        launches += [shape.launch("modulation", w, part, w, part) for part in parts]
        # the first norm has no residual before it: x, shift, scale and h only
        launches.append(shape.launch("norm_modulate", *((5 * w, 2 * w) if i else (3 * w, w))))
        launches.append(shape.launch("up", w, p, w, p))
        launches.append(shape.launch("activation", p, h))
        launches.append(shape.launch("down", h, w, h, w))
    if shape.final:
        launches.append(shape.launch("modulation", w, 2 * w, w, 2 * w))
    return [*launches, shape.launch("norm_modulate", (5 if shape.final else 3) * w, 2 * w)]


def _forward_by_products(shape: Shape, keep: str) -> list[Launch]:
    w, h = shape.width, shape.hidden
    p = 2 * h if shape.gated else h
    kept, both = keep in ("all", "no gate"), keep == "all"
    moments = shape.moments(w)
    launches = [_add(shape.launch("moments", w, 0), written=moments)]

    def modulated() -> Launch:
        return _add(shape.launch("modulated", 2 * w, w + kept * w, w, 2 * w), read=moments)

    for _ in range(shape.depth):
        launches += [modulated(), shape.launch("up", w, h + kept * p, w, p)]
        moments = shape.moments(PART)
        down = shape.launch("down", h + w, w + both * w, h, w)
        gate = shape.launch("gate", w, both * w, w, w)
        launches.append(_add(down, gate.read, gate.written + moments, gate.flops))
    if shape.final and kept:
        launches.append(shape.launch("fill", 0, w))  # the last shift's place
    return [*launches, modulated() if shape.final else shape.launch("norm_modulate", w, w)]


def sampling(shape: Shape, steps: int, together: int) -> list[Launch]:
    """The launches of a sampler's steps whose modulations are made before them, with those of `together` steps at once.

    Args:
        shape: of the blocks in one step.
        steps: evaluations of the head.
        together: steps whose rows go through each modulation's product together.
    """
    launches = []
    for first in range(0, steps, together):
        count = min(together, steps - first)
        launches += [made for made in forward(shape._replace(rows=count * shape.rows), "rows") if _is_modulation(made)]
        launches += count * [launch for launch in forward(shape, "rows") if not _is_modulation(launch)]
    return launches


def _is_modulation(launch: Launch) -> bool:
    return launch.name == "modulation"


def backward(shape: Shape, path: str) -> list[Launch]:
    """The launches over all rows of a backward pass for which all was kept, weight gradients among them.

    Args:
        shape: of the blocks.
        path: "rows" or "products".
    """
    w, h = shape.width, shape.hidden
    p = 2 * h if shape.gated else h

    def modulation(parts: int) -> list[Launch]:
        """The gradient of a is added to; then the weight's."""
        of_a = shape.launch("gradient of a", parts * w + w, w, parts * w, w)
        return [of_a, shape.weight_gradient(w, parts * w)]

    # the last norm: dout, sum, gate and q in, and scale; out come those of the sum, q and gate, of shift and scale
    last = shape.launch("norm_modulate_backward", (5 if shape.final else 4) * w, (5 if shape.final else 3) * w)
    launches = [last, *(modulation(2) if shape.final else [])]
    for i in reversed(range(shape.depth)):
        if path == "rows":
            launches.append(shape.launch("down_backward", w, h, w, h))
            launches.append(shape.launch("activation_backward", h + p, h + p))
        else:
            launches.append(shape.launch("down_backward", w + p, h + p, w, h))
        launches += [shape.weight_gradient(h, w), shape.weight_gradient(w, p)]
        launches.append(shape.launch("up_backward", p, w, p, w))
        # dh, the sum's gradient, sum and scale in; of the sum and scale out; with gate and q of the block before
        launches.append(shape.launch("norm_modulate_backward", *((6 * w, 4 * w) if i else (4 * w, 2 * w))))
        launches += modulation(3)
    return launches

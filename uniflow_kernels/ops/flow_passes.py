"""The flow head's forward and backward pass, each on one of two paths of Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow_kernels.ops import flow_choice
from uniflow_kernels.ops.flow_blocks import Affine, Block, Form, in_order
from uniflow_kernels.triton_kernels import architecture

if TYPE_CHECKING:
    from uniflow_kernels.triton_kernels.flow_head import Rows


class _Kept(NamedTuple):
    """What is kept: sums after each block, modulations (their shift replaced by h, if `Pass.in_place`), h, p, q."""

    sums: list[Tensor]
    modulations: list[Tensor]
    h: list[Tensor]
    p: list[Tensor]
    q: list[Tensor]


class _Activations(NamedTuple):
    """What the backward pass needs of a block, with p the MLP before its activation and q its output."""

    h: Tensor
    scale: Tensor
    gate: Tensor
    p: Tensor
    q: Tensor


class Pass:
    """One forward or backward pass over x [R, W] and a [C, W], on one of two paths.

    "rows" has row kernels around the library's products; "products" has the row kernels' work in the epilogues of its
    own. Both keep the same, so that each pass chooses for itself, by the number of rows at run time.
    """

    def __init__(
        self,
        x: Tensor,
        a: Tensor,
        weights: Sequence[Tensor | None],
        depth: int,
        repeat: int,
        form: Form,
        keep: str,
    ) -> None:
        self.x, self.a, self.form, self.keep, self.depth = x, a, form, keep, depth
        pairs = [Affine(*weights[i : i + 2]) for i in range(0, len(weights), 2)]  # type: ignore[arg-type]
        self.final = pairs[0] if weights[0] is not None else None
        self.blocks = [Block(*pairs[1 + 3 * i : 4 + 3 * i]) for i in range(depth)]
        self.modulations = pairs[1 + 3 * depth :]
        self.per_group = depth // len(self.modulations)
        self.width = x.shape[1]
        self.repeat = repeat
        # h takes the place of shift, which nobody needs any more, where no other row or block shares it
        self.in_place = a.shape[0] == x.shape[0] and self.per_group == 1

    def split(self, modulation: Tensor) -> list[Tensor]:
        """Shift, scale and, if it is there, gate [C, W], as views."""
        parts = list(modulation.split(self.width, dim=1))
        return parts if self.form.modulation_order == "shift-scale-gate" else [parts[1], parts[0], *parts[2:]]

    def empty(self, rows: int, width: int) -> Tensor:
        """Of x's dtype, on its device."""
        return torch.empty(rows, width, dtype=self.x.dtype, device=self.x.device)

    def counts(self) -> list[int]:
        """How many tensors `_Kept` has of each kind."""
        if self.keep == "nothing":
            return [0] * 5
        if self.keep == "inputs":
            return [self.depth, 0, 0, 0, 0]
        groups, last = len(self.modulations), int(self.final is not None)
        h, q = 0 if self.in_place else self.depth, self.depth if self.keep == "all" else 0
        return [self.depth, groups + last, h, self.depth, q]

    def kept_shapes(self) -> list[tuple[int, int]]:
        """The shapes of what is kept, flat."""
        rows, conditions, width = self.x.shape[0], self.a.shape[0], self.width
        _, modulations, h, p, q = self.counts()
        parts = 3 if self.keep == "all" else 2
        last = int(modulations > 0 and self.final is not None)
        return [
            *[(rows, width)] * self.depth * (self.keep != "nothing"),
            *[(conditions, parts * width)] * (modulations - last),
            *[(conditions, 2 * width)] * last,
            *[(rows, width)] * h,
            *[(rows, self.blocks[0].up.weight.shape[0])] * p,
            *[(rows, width)] * q,
        ]

    def unflatten(self, kept: Sequence[Tensor]) -> _Kept:
        """What `forward` kept, by its kind."""
        tensors = iter(kept)
        return _Kept(*([next(tensors) for _ in range(count)] for count in self.counts()))

    def why_not_products(self) -> str | None:
        """Why the path "products" cannot serve; None if it can."""
        from uniflow_kernels.triton_kernels import flow_products as products

        if self.a.shape[0] != self.x.shape[0]:
            return "rows share a condition"
        if self.per_group != 1:
            return "blocks share a modulation"
        every = [self.x, self.a, *(t for affine in self.modulations for t in affine if t is not None)]
        every += [t for block in self.blocks for affine in block for t in affine if t is not None]
        every += [] if self.final is None else [t for t in self.final if t is not None]
        hidden = self.blocks[0].down.weight.shape[1]
        return products.why_not(self.x.device, self.x.dtype, (self.width, hidden), every)

    def path(self) -> str:
        """The path of this pass, "rows" or "products"."""
        arch = architecture(self.x.device)
        training = self.keep != "nothing"
        wanted = flow_choice._forced_path or flow_choice._path(
            arch, self.x.dtype, self.width, self.x.shape[0], training
        )
        why_not = self.why_not_products() if wanted == "products" else None
        if why_not is not None and flow_choice._forced_path is not None:
            raise ValueError(f"flow_head: path 'products' cannot serve this input: {why_not}")
        return wanted if why_not is None else "rows"

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The output [R, W] and what is kept, flat."""
        out, kept = self.forward_by_rows() if self.path() == "rows" else self.forward_by_products()
        return out, [tensor for kind in kept for tensor in kind]

    def forward_by_products(self) -> tuple[Tensor, _Kept]:
        """Three launches a block; shift, scale and gate are written only where they are kept."""
        from uniflow_kernels.triton_kernels import flow_head as kernels
        from uniflow_kernels.triton_kernels import flow_products as products

        rows, width = self.x.shape
        first = self.blocks[0]
        rms, eps, keep = self.form.norm == "rms", self.form.eps, self.keep
        scale_first = self.form.modulation_order == "scale-shift-gate"
        kept = _Kept([], [], [], [], [])
        h, u = self.empty(rows, width), self.empty(rows, first.down.weight.shape[1])
        scale = gate = p = q = None
        x, moments = self.x, products.moments(self.x, rms)
        for i, block in enumerate(self.blocks):
            modulation = self.modulations[i]
            if keep in ("all", "no gate"):
                kept.modulations.append(self.empty(rows, (3 if keep == "all" else 2) * width))
                h, scale, *gates = self.split(kept.modulations[i])  # h where shift would be
                gate = gates[0] if gates else None
                p = self.empty(rows, block.up.weight.shape[0])
                kept.p.append(p)
            if keep == "all":
                q = self.empty(rows, width)
                kept.q.append(q)
            products.modulated(x, moments, self.a, modulation, block.norm, h, scale, scale_first, rms, eps)
            products.up(h, block.up, u, p)
            total = self.empty(rows, width) if i == 0 or keep != "nothing" else x
            gate_affine = self._rows_of(modulation, slice(2 * width, None))
            moments = products.down(x, self.a, gate_affine, u, block.down, total, gate, q, rms)
            x = total
            if keep != "nothing":
                kept.sums.append(x)
        out = self.empty(rows, width)
        if self.final is None:
            which = kernels.Rows(rows, rows, 1)
            kernels.norm_modulate(x, None, (None, None), None, None, out, which, rms, eps)
            return out, kept
        if keep in ("all", "no gate"):
            kept.modulations.append(self.empty(rows, 2 * width))
            shift, scale = self.split(kept.modulations[-1])
            shift.zero_()  # nobody reads it; but what an op returns is the same in every run
        products.modulated(x, moments, self.a, self.final, (None, None), out, scale, scale_first, rms, eps)
        return out, kept

    def forward_by_rows(self) -> tuple[Tensor, _Kept]:
        """Five launches a block."""
        from uniflow_kernels.triton_kernels import flow_head as kernels

        which = kernels.Rows(self.x.shape[0], self.a.shape[0], self.repeat)
        rms, eps, keep = self.form.norm == "rms", self.form.eps, self.keep
        kept = _Kept([], [], [], [], [])
        x, residual = self.x, None
        for i, block in enumerate(self.blocks):
            if i % self.per_group == 0:
                shift, scale, gate, modulation = self.modulate(self.modulations[i // self.per_group])
                if keep in ("all", "no gate"):
                    kept.modulations.append(modulation)
            h = shift if self.in_place else self.empty(*x.shape)
            total = x
            if residual is not None and (i == 1 or keep != "nothing"):
                total = self.empty(*x.shape)
            kernels.norm_modulate(x, residual, block.norm, (shift, scale), total, h, which, rms, eps)
            x = total
            p = F.linear(h, *block.up)
            q = F.linear(kernels.activation(p, block.down.weight.shape[1]), *block.down)
            residual = gate, q
            if i and keep != "nothing":
                kept.sums.append(x)
            if keep in ("all", "no gate"):
                kept.p.append(p)
                if not self.in_place:
                    kept.h.append(h)
            if keep == "all":
                kept.q.append(q)
        last = None
        if self.final is not None:
            modulation = self._made(self.final)
            last = self.split(modulation)[0], self.split(modulation)[1]
            if keep in ("all", "no gate"):
                kept.modulations.append(modulation)
        out = self.empty(*x.shape)
        total = self.empty(*x.shape)
        kernels.norm_modulate(x, residual, (None, None), last, total, out, which, rms, eps)
        if keep != "nothing":
            kept.sums.append(total)
        return out, kept

    def modulate(self, modulation: Affine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shift, scale and gate [C, W], and the tensor of them that is kept: all three, or shift and scale."""
        if self.keep != "no gate":
            all_three = self._made(modulation)
            shift, scale, gate = self.split(all_three)
            return shift, scale, gate, all_three
        two = F.linear(self.a, *self._rows_of(modulation, slice(None, 2 * self.width)))
        shift, scale = self.split(two)
        return shift, scale, self._gate(modulation), two

    def _made(self, modulation: Affine) -> Tensor:
        """All parts of a modulation, [C, 2W or 3W]."""
        return F.linear(self.a, *modulation)

    def _gate(self, modulation: Affine) -> Tensor:
        return F.linear(self.a, *self._rows_of(modulation, slice(2 * self.width, None)))

    @staticmethod
    def _rows_of(affine: Affine, rows: slice) -> Affine:
        return Affine(affine.weight[rows], None if affine.bias is None else affine.bias[rows])

    def activations(self, i: int, x: Tensor, kept: _Kept, path: str) -> _Activations:
        """Those of block i, whose input is x, kept or computed again."""
        from uniflow_kernels.triton_kernels import flow_head as kernels
        from uniflow_kernels.triton_kernels import flow_products as products

        block, modulation = self.blocks[i], self.modulations[i // self.per_group]
        hidden = block.down.weight.shape[1]
        if self.keep == "inputs" and path == "products":
            rms, scale_first = self.form.norm == "rms", self.form.modulation_order == "scale-shift-gate"
            h, scale, p = self.empty(*x.shape), self.empty(*x.shape), self.empty(len(x), block.up.weight.shape[0])
            u = self.empty(len(x), hidden)
            moments = products.moments(x, rms)
            products.modulated(x, moments, self.a, modulation, block.norm, h, scale, scale_first, rms, self.form.eps)
            products.up(h, block.up, u, p)
            return _Activations(h, scale, self._gate(modulation), p, F.linear(u, *block.down))
        if self.keep == "inputs":
            which = kernels.Rows(self.x.shape[0], self.a.shape[0], self.repeat)
            shift, scale, gate, _ = self.modulate(modulation)
            h = shift if which.conditions == which.rows else self.empty(*x.shape)
            rms = self.form.norm == "rms"
            kernels.norm_modulate(x, None, block.norm, (shift, scale), None, h, which, rms, self.form.eps)
            p = F.linear(h, *block.up)
            return _Activations(h, scale, gate, p, F.linear(kernels.activation(p, hidden), *block.down))
        shift, scale, *gates = self.split(kept.modulations[i // self.per_group])
        h, p = shift if self.in_place else kept.h[i], kept.p[i]
        if self.keep == "all":
            return _Activations(h, scale, gates[0], p, kept.q[i])
        q = F.linear(kernels.activation(p, hidden), *block.down)
        return _Activations(h, scale, self._gate(modulation), p, q)

    def backward(self, dout: Tensor, kept: _Kept, weight_gradients: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of x [R, W], of a [C, W] and, if wanted, of the weights that are there, in their order."""
        from uniflow_kernels.triton_kernels import flow_head as kernels
        from uniflow_kernels.triton_kernels import flow_products as products

        path = self.path()
        which = kernels.Rows(self.x.shape[0], self.a.shape[0], self.repeat)
        rms, eps = self.form.norm == "rms", self.form.eps
        inputs = [self.x, *kept.sums]
        gradients = _Gradients(self)

        def places(parts: int) -> tuple[Tensor | None, list[Tensor]]:
            """Where the modulations' gradients go row by row: [R, parts * W] and its columns; nowhere if summed."""
            if not which.per_row:
                return None, []
            whole = self.empty(which.rows, parts * self.width)
            return whole, self.split(whole)

        now = self.activations(self.depth - 1, inputs[-2], kept, path)
        dlast, last_places = places(2) if self.final is not None else (None, [])
        dmodulation, columns = places(3)
        last = None
        if self.final is not None:
            kept_last = kept.modulations[-1] if kept.modulations else F.linear(self.a, *self.final)
            last = self.split(kept_last)[1]
        dx, dq, sums = kernels.norm_modulate_backward(
            unit_stride(dout),
            None,
            inputs[-1],
            (now.gate, now.q),
            (None, None),
            last,
            (last_places[0], last_places[1]) if last_places else None,
            columns[2] if columns else None,
            which,
            rms,
            eps,
        )
        if self.final is not None:
            gradients.modulation(self.final, dlast, sums[:, 2:4], which, weight_gradients)
        for i in reversed(range(self.depth)):
            block = self.blocks[i]
            assert dq is not None
            if path == "products":
                dp, u, dup = products.down_backward(dq, block.down.weight, now.p)
            else:
                dp, u, dup = kernels.activation_backward(dq @ block.down.weight, now.p)
            if weight_gradients:
                gradients.affine(block.down, dq, u, sums[:, 5].sum(0))
                gradients.affine(block.up, dp, now.h, dup)
            dh = torch.mm(dp, block.up.weight, out=columns[0]) if columns else dp @ block.up.weight
            before = self.activations(i - 1, inputs[i - 1], kept, path) if i else None
            dbefore, columns_before = places(3) if i else (None, [])
            dgate = sums[:, 4:5]
            dx, dq, sums = kernels.norm_modulate_backward(
                dh,
                dx,
                inputs[i],
                None if before is None else (before.gate, before.q),
                block.norm,
                now.scale,
                (dh, columns[1]) if columns else None,
                columns_before[2] if columns_before else None,
                which,
                rms,
                eps,
            )
            if weight_gradients:
                gradients.norm(block.norm, sums[:, :2].sum(0))
            modulation = self.modulations[i // self.per_group]
            summed = torch.cat([sums[:, 2:4], dgate], 1)
            last_of_group = i % self.per_group == 0
            gradients.modulation(modulation, dmodulation, summed, which, weight_gradients, last_of_group)
            dmodulation, columns = dbefore, columns_before
            if before is not None:
                now = before
        return dx, gradients.of_a, gradients.in_order() if weight_gradients else []


class ModulatedPass(Pass):
    """A forward pass that keeps nothing, by rows; modulations of every row stand where the layers would that make them.

    Of a only the number of rows counts then, so x stands for it.
    """

    def __init__(
        self, x: Tensor, modulations: Sequence[Tensor], weights: Sequence[Tensor | None], per_group: int, form: Form
    ) -> None:
        depth = len(weights) // 6
        groups = [tensor for modulation in modulations[: depth // per_group] for tensor in (modulation, None)]
        last = modulations[depth // per_group] if len(modulations) > depth // per_group else None
        super().__init__(x, x, [last, None, *weights, *groups], depth, 1, form, "nothing")
        self.in_place = False  # the modulations are the caller's

    def _made(self, modulation: Affine) -> Tensor:
        return modulation.weight

    def why_not_products(self) -> str:
        """Why the path "products" cannot serve."""
        return "the modulations are made before"


class _Gradients:
    """Gradients of the weights and of a, which every modulation adds to.

    A weight may be given for several layers: gradients are found by the layer's tuple, not by the tensor.
    """

    def __init__(self, of: Pass) -> None:
        self.pass_ = of
        self.of_a = torch.zeros_like(of.a, memory_format=torch.contiguous_format)
        self.found: dict[int, Affine] = {}
        self.group: tuple[Tensor, Tensor] | None = None

    def affine(self, affine: Affine, dout: Tensor, given: Tensor, dbias: Tensor) -> None:
        """Of a linear layer with input `given` [R, in]; dout [R, out], and dbias [out] in float32."""
        self.add(affine, dout.t() @ given, dbias)

    def norm(self, norm: Affine, sums: Tensor) -> None:
        """Of a norm; sums [2, W] in float32. Copies, since what an op returns shares no memory."""
        self.add(norm, sums[0].to(norm.weight.dtype, copy=True), sums[1].clone())

    def add(self, affine: Affine, dweight: Tensor, dbias: Tensor) -> None:
        self.found[id(affine)] = Affine(dweight, None if affine.bias is None else dbias.to(affine.bias.dtype))

    def modulation(
        self,
        affine: Affine,
        by_row: Tensor | None,
        sums: Tensor,
        which: Rows,
        weight_gradients: bool,
        last_of_group: bool = True,
    ) -> None:
        """Of the linear layer of a modulation, and its part of a's gradient: one product each for all its parts.

        Args:
            affine: the layer.
            by_row: gradient of its output, row by row, [R, parts * W]; None if `sums` holds it summed.
            sums: of shift, scale (and gate), float32 [C, parts, W]; [1, parts, W] beside `by_row`.
            which: which condition is each row's.
            weight_gradients: whether the layer's are wanted.
            last_of_group: whether no further block shares the layer; until then gradients are only summed.
        """
        pass_ = self.pass_
        if pass_.form.modulation_order == "scale-shift-gate":
            sums = torch.cat([sums[:, 1:2], sums[:, :1], sums[:, 2:]], 1)
        summed = sums.flatten(1)  # [C or 1, parts * W]
        dmodulation = summed.to(pass_.x.dtype) if by_row is None else which.to_conditions(by_row)
        if self.group is not None:
            dmodulation, summed = dmodulation.add_(self.group[0]), summed.add_(self.group[1])
        self.group = None if last_of_group else (dmodulation, summed)
        if last_of_group:
            self.of_a.addmm_(dmodulation, affine.weight)
            if weight_gradients:
                self.affine(affine, dmodulation, pass_.a, summed.sum(0))

    def in_order(self) -> list[Tensor]:
        pass_ = self.pass_
        affines = in_order(pass_.blocks, pass_.modulations, pass_.final)
        gradients = [self.found[id(affine)] for affine in affines if affine[0] is not None]
        return [tensor for pair in gradients for tensor in pair if tensor is not None]


def unit_stride(rows: Tensor) -> Tensor:
    """Rows whose elements follow each other in memory."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()

"""The flow head's forward and backward pass, each on one of two paths of Triton kernels; and few rows on a CPU.

"rows" has row kernels around the library's products; "products" has the row kernels' work in the epilogues of its own.
Both keep the same for a backward pass on either. "few rows" is one call of the CPU part and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow_kernels import cpu_kernels
from uniflow_kernels.ops.flow_blocks import Affine, Block, Form, FromLayers, Given, flat_rows, in_order
from uniflow_kernels.ops.flow_choice import FEW, SMALL, Call, choose_path, of_products, what_is_shared
from uniflow_kernels.torch_private import foreach_copy_

if TYPE_CHECKING:
    from uniflow_kernels.triton_kernels.flow_head import Rows


class Kept(NamedTuple):
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
    """One forward or backward pass over rows.

    Args:
        x: [R, W].
        blocks: the blocks' tensors.
        modulations: where they come from, each of C conditions.
        form: of the head.
        repeat: how many rows that follow each other share a condition: row r has condition (r // repeat) % C.
        keep: what is kept for a backward pass: "nothing", "inputs" (the sum that each block makes) or "all" (with it h,
            the modulation, p and q, see `_Activations`).
    """

    def __init__(
        self,
        x: Tensor,
        blocks: Sequence[Block],
        modulations: FromLayers | Given,
        form: Form,
        repeat: int = 1,
        keep: str = "nothing",
    ) -> None:
        self.x, self.modulations, self.form, self.repeat, self.keep = x, modulations, form, repeat, keep
        # the row kernels read these as they lie
        self.blocks = [block._replace(norm=_unit_strides(block.norm)) for block in blocks]
        self.rows, self.width = x.shape
        self.hidden = blocks[0].down.weight.shape[1]
        self.depth, self.groups = len(blocks), len(modulations.groups)
        self.per_group = self.depth // self.groups
        # len() would fix the sizes of a graph of any number of rows
        self.conditions = (modulations.a if isinstance(modulations, FromLayers) else modulations.groups[0]).shape[0]
        # h takes the place of shift, which nobody needs any more, where no other row or block shares it
        self.in_place = isinstance(modulations, FromLayers) and self.conditions == self.rows and self.per_group == 1

    @property
    def layers(self) -> FromLayers:
        """What makes the modulations, where they are made here."""
        assert isinstance(self.modulations, FromLayers)
        return self.modulations

    def split(self, modulation: Tensor) -> list[Tensor]:
        """Shift, scale and, if it is there, gate [C, W], as views."""
        parts = list(modulation.split(self.width, dim=1))
        return parts if self.form.modulation_order == "shift-scale-gate" else [parts[1], parts[0], *parts[2:]]

    def empty(self, rows: int, width: int) -> Tensor:
        """Of x's dtype, on its device."""
        return torch.empty(rows, width, dtype=self.x.dtype, device=self.x.device)

    def _counts(self) -> list[int]:
        """How many tensors `Kept` has of each kind."""
        if self.keep != "all":
            return [self.depth if self.keep == "inputs" else 0, 0, 0, 0, 0]
        modulations = self.groups + (self.modulations.final is not None)
        return [self.depth, modulations, 0 if self.in_place else self.depth, self.depth, self.depth]

    def fake(self) -> tuple[Tensor, list[Tensor]]:
        """What `forward` gives, without the work."""
        sums, modulations, h, p, q = self._counts()
        widths = [3 * self.width] * min(self.groups, modulations) + [2 * self.width] * max(0, modulations - self.groups)
        shapes = [
            *[(self.rows, self.width)] * sums,
            *[(self.conditions, width) for width in widths],
            *[(self.rows, self.width)] * h,
            *[(self.rows, self.blocks[0].up.weight.shape[0])] * p,
            *[(self.rows, self.width)] * q,
        ]
        return self.empty(self.rows, self.width), [self.empty(*shape) for shape in shapes]

    def unflatten(self, kept: Sequence[Tensor]) -> Kept:
        """What `forward` kept, by its kind."""
        tensors = iter(kept)
        return Kept(*([next(tensors) for _ in range(count)] for count in self._counts()))

    def path(self, asked: str) -> str:
        """The path of this pass: the one that its op was given, or one that is chosen now if it was given "auto"."""
        if asked == "rows":
            return asked
        a, groups, final = self.layers
        call = Call(
            self.x.device,
            self.x.dtype,
            self.width,
            self.hidden,
            self.rows,
            training=self.keep != "nothing",
            shared=what_is_shared(self.conditions, self.rows, self.groups, self.depth),
            tensors=[self.x, a, *of_products(self.blocks, groups, final)],
        )
        return choose_path(call, asked, in_op=True)

    def forward(self, path: str) -> tuple[Tensor, list[Tensor]]:
        """The output [R, W] and what is kept, flat; on a path, or on one that is chosen now ("auto")."""
        if path == FEW:
            return self._forward_of_few(), []
        path = self.path(path)
        out, kept = self._forward_by_rows() if path == "rows" else self._forward_by_products(path in SMALL)
        return out, [tensor for kind in kept for tensor in kind]

    def _forward_of_few(self) -> Tensor:
        """One call for all blocks, of weights in x's dtype without gaps."""
        norms = [block.norm for block in self.blocks]
        if any(vector is not None and vector.dtype != self.x.dtype for norm in norms for vector in norm):
            norms = [Affine(*(None if vector is None else vector.float() for vector in norm)) for norm in norms]  # type: ignore[arg-type]
        blocks = [block._replace(norm=norm) for block, norm in zip(self.blocks, norms, strict=True)]
        given, out = self.modulations, self.empty(self.rows, self.width)
        a: Tensor | None = None
        made: Sequence[Tensor] = ()
        layers: Sequence[Affine] = ()
        last = None
        if isinstance(given, FromLayers):
            a, layers, last = given.a.contiguous(), given.groups, given.final
        else:
            made = [flat_rows(group) for group in (*given.groups, given.final) if group is not None]
        cpu_kernels.flow_blocks(
            self.x.contiguous(),
            a,
            [tensor for affine in in_order(blocks, layers, last) for tensor in affine],
            made,
            (self.depth, self.groups, self.conditions, self.repeat),
            *self.form,
            out=out,
        )
        return out

    def _forward_by_products(self, small: bool) -> tuple[Tensor, Kept]:
        """Three launches a block; shift, scale and gate are written only where they are kept."""
        from uniflow_kernels.triton_kernels import flow_products, products

        a, groups, final = self.layers
        kept = Kept([], [], [], [], [])
        h, u = self.empty(self.rows, self.width), self.empty(self.rows, self.hidden)
        scale = gate = p = q = None
        x, moments = self.x, products.moments(self.x, self._is_rms)
        for block, layer in zip(self.blocks, groups, strict=True):
            if self.keep == "all":
                kept.modulations.append(self.empty(self.rows, 3 * self.width))
                kept.p.append(self.empty(self.rows, block.up.weight.shape[0]))
                kept.q.append(self.empty(self.rows, self.width))
                h, scale, gate = self.split(kept.modulations[-1])  # h where shift would be
                p, q = kept.p[-1], kept.q[-1]
            self._modulated(x, moments, layer, block.norm, h, scale, small)
            flow_products.up(h=h, affine=block.up, u=u, p=p, small=small)
            total = self.empty(self.rows, self.width) if x is self.x or self.keep != "nothing" else x
            moments = flow_products.down(
                x=x,
                a=a,
                modulation=layer,
                u=u,
                affine=block.down,
                total=total,
                gate=gate,
                q=q,
                rms=self._is_rms,
                done=moments,
                small=small,
            )
            x = total
            if self.keep != "nothing":
                kept.sums.append(x)
        out = self.empty(self.rows, self.width)
        if final is None:
            self._row_kernel(x=x, residual=None, norm=(None, None), modulation=None, total=None, h=out)
            return out, kept
        if self.keep == "all":
            kept.modulations.append(self.empty(self.rows, 2 * self.width))
            shift, scale = self.split(kept.modulations[-1])
            shift.zero_()  # nobody reads it; but what an op returns is the same in every run
        self._modulated(x, moments, final, (None, None), out, scale, small)
        return out, kept

    def _forward_by_rows(self) -> tuple[Tensor, Kept]:
        """Five launches a block; four where the modulations are given."""
        from uniflow_kernels.triton_kernels.activation import activation

        kept = Kept([], [], [], [], [])
        x, residual = self.x, None
        for i, block in enumerate(self.blocks):
            if i % self.per_group == 0:
                modulation = self.modulations.of_group(i // self.per_group)
                shift, scale, gate = self.split(modulation)
                if self.keep == "all":
                    kept.modulations.append(modulation)
            h = shift if self.in_place else self.empty(self.rows, self.width)
            total = x
            if residual is not None and (i == 1 or self.keep != "nothing"):
                total = self.empty(self.rows, self.width)
            self._row_kernel(x=x, residual=residual, norm=block.norm, modulation=(shift, scale), total=total, h=h)
            x = total
            p = F.linear(h, *block.up)
            q = F.linear(activation(p, self.hidden), *block.down)
            residual = gate, q
            if i and self.keep != "nothing":
                kept.sums.append(x)
            if self.keep == "all":
                kept.p.append(p)
                kept.q.append(q)
                if not self.in_place:
                    kept.h.append(h)
        last = self.modulations.of_last_norm()
        if last is not None and self.keep == "all":
            kept.modulations.append(last)
        parts = None if last is None else tuple(self.split(last))
        out, total = self.empty(self.rows, self.width), self.empty(self.rows, self.width)
        self._row_kernel(x=x, residual=residual, norm=(None, None), modulation=parts, total=total, h=out)
        if self.keep != "nothing":
            kept.sums.append(total)
        return out, kept

    @property
    def _is_rms(self) -> bool:
        return self.form.norm == "rms"

    def _which(self) -> Rows:
        from uniflow_kernels.triton_kernels.flow_head import Rows

        return Rows(self.rows, self.conditions, self.repeat)

    def _row_kernel(self, **what: Any) -> None:
        """`norm_modulate` of this pass's rows, with its kind of norm."""
        from uniflow_kernels.triton_kernels.flow_head import norm_modulate

        norm_modulate(**what, which=self._which(), rms=self._is_rms, eps=self.form.eps)

    def _modulated(
        self,
        x: Tensor,
        of_x: Any,
        layer: Affine,
        norm: tuple[Tensor | None, Tensor | None],
        h: Tensor,
        scale: Tensor | None,
        small: bool,
    ) -> None:
        """h = norm(x) * (1 + scale) + shift by a product of a; `of_x`: the moments of x."""
        from uniflow_kernels.triton_kernels import flow_products

        flow_products.modulated(
            x=x,
            of_x=of_x,
            a=self.layers.a,
            modulation=layer,
            norm=norm,
            h=h,
            scale=scale,
            scale_first=self.form.modulation_order == "scale-shift-gate",
            rms=self._is_rms,
            eps=self.form.eps,
            small=small,
        )

    def _gate_layer(self, layer: Affine) -> Affine:
        """The part of a modulation's layer that makes the gate."""
        return Affine(*(None if t is None else t[2 * self.width :] for t in layer))  # type: ignore[arg-type]

    def _activations(self, i: int, x: Tensor, kept: Kept, path: str) -> _Activations:
        """Those of block i, whose input is x, kept or computed again."""
        from uniflow_kernels.triton_kernels import flow_products, products
        from uniflow_kernels.triton_kernels.activation import activation

        block, group = self.blocks[i], i // self.per_group
        if self.keep == "all":
            shift, scale, gate = self.split(kept.modulations[group])
            return _Activations(shift if self.in_place else kept.h[i], scale, gate, kept.p[i], kept.q[i])
        if path != "rows":
            layer = self.layers.groups[group]
            h, scale = self.empty(self.rows, self.width), self.empty(self.rows, self.width)
            p, u = self.empty(self.rows, block.up.weight.shape[0]), self.empty(self.rows, self.hidden)
            self._modulated(x, products.moments(x, self._is_rms), layer, block.norm, h, scale, path in SMALL)
            flow_products.up(h=h, affine=block.up, u=u, p=p, small=path in SMALL)
            gate = F.linear(self.layers.a, *self._gate_layer(layer))
            return _Activations(h, scale, gate, p, F.linear(u, *block.down))
        shift, scale, gate = self.split(self.modulations.of_group(group))
        h = shift if self.conditions == self.rows else self.empty(self.rows, self.width)
        self._row_kernel(x=x, residual=None, norm=block.norm, modulation=(shift, scale), total=None, h=h)
        p = F.linear(h, *block.up)
        return _Activations(h, scale, gate, p, F.linear(activation(p, self.hidden), *block.down))

    def backward(
        self, dout: Tensor, kept: Kept, weight_gradients: bool, path: str
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of x [R, W], of a [C, W] and, if wanted, of the weights that are there, in their order.

        Args:
            dout: gradient of the output, [R, W].
            kept: by the forward pass, on whichever path.
            weight_gradients: whether those of the weights are wanted.
            path: as in `forward`.
        """
        from uniflow_kernels.triton_kernels import flow_products
        from uniflow_kernels.triton_kernels.activation import activation_backward
        from uniflow_kernels.triton_kernels.flow_head import norm_modulate_backward
        from uniflow_kernels.triton_kernels.sums import ProgramSums

        path = self.path(path)
        which, final = self._which(), self.layers.final
        inputs = [self.x, *kept.sums]
        # of vectors' gradients, which nobody needs before the last block; those of modulations may be
        of_activations = ProgramSums(self.depth)
        of_norms = ProgramSums(self.depth + 1) if which.per_row and self.per_group == 1 else None
        through_norm = partial(norm_modulate_backward, which=which, rms=self._is_rms, eps=self.form.eps, sums=of_norms)
        gradients = _Gradients(self, which, weight_gradients)

        def places(parts: int) -> tuple[Tensor | None, list[Tensor]]:
            """Where the modulations' gradients go row by row: [R, parts * W] and its columns; nowhere if summed."""
            if not which.per_row:
                return None, []
            whole = self.empty(self.rows, parts * self.width)
            return whole, self.split(whole)

        now = self._activations(self.depth - 1, inputs[-2], kept, path)
        dlast, last_columns = places(2) if final is not None else (None, [])
        dmodulation, columns = places(3)
        last = kept.modulations[-1] if kept.modulations and final is not None else self.modulations.of_last_norm()
        dx, dq, sums = through_norm(
            dh=flat_rows(dout),
            dsum=None,
            x=inputs[-1],
            residual=(now.gate, now.q),
            norm=(None, None),
            scale=None if last is None else self.split(last)[1],
            dmodulation=(last_columns[0], last_columns[1]) if last_columns else None,
            dgate=columns[2] if columns else None,
        )
        if final is not None:
            gradients.modulation(final, dlast, [sums[:, 2:3], sums[:, 3:4]])
        for i in reversed(range(self.depth)):
            block = self.blocks[i]
            assert dq is not None
            if path != "rows":
                dp, u, dup = flow_products.down_backward(dq, block.down.weight, now.p, path in SMALL, of_activations)
            else:
                dp, u, dup = activation_backward(dq @ block.down.weight, now.p, of_activations)
            gradients.affine(block.down, dq, u, [_over_rows(sums[:, 5])])
            gradients.affine(block.up, dp, now.h, [dup])
            dh = torch.mm(dp, block.up.weight, out=columns[0]) if columns else dp @ block.up.weight
            before = self._activations(i - 1, inputs[i - 1], kept, path) if i else None
            dbefore, columns_before = places(3) if i else (None, [])
            dgate = sums[:, 4:5]
            dx, dq, sums = through_norm(
                dh=dh,
                dsum=dx,
                x=inputs[i],
                residual=None if before is None else (before.gate, before.q),
                norm=block.norm,
                scale=now.scale,
                dmodulation=(dh, columns[1]) if columns else None,
                dgate=columns_before[2] if columns_before else None,
            )
            gradients.norm(block.norm, _over_rows(sums[:, :2]))
            layer, parts = self.layers.groups[i // self.per_group], [sums[:, 2:3], sums[:, 3:4], dgate]
            gradients.modulation(layer, dmodulation, parts, last_of_group=i % self.per_group == 0)
            dmodulation, columns = dbefore, columns_before
            if before is not None:
                now = before
        for sums_of in (of_activations, of_norms):
            if weight_gradients and sums_of is not None:
                sums_of.add_up()
        assert gradients.of_a is not None
        return dx, gradients.of_a, gradients.in_order()


class _Gradients:
    """Gradients of the weights, if they are wanted, and of a, which every modulation adds to.

    A weight may be given for several layers: gradients are found by the layer's tuple, not by the tensor.
    """

    def __init__(self, of: Pass, which: Rows, wanted: bool) -> None:
        self.pass_, self.which, self.wanted = of, which, wanted
        self.of_a: Tensor | None = None
        self.found: dict[int, Affine] = {}
        # gradients of vectors and what they are copied from, by the gradients' dtype: one launch for all of them
        self.vectors: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        self.group: tuple[Tensor, Tensor] | None = None

    def affine(self, affine: Affine, dout: Tensor, given: Tensor, dbias: Sequence[Tensor]) -> None:
        """Of a linear layer with input `given` [R, in]; dout [R, out], and dbias [out] in float32, in parts."""
        if self.wanted:
            self.found[id(affine)] = Affine(dout.t() @ given, self._vector(affine.bias, dbias))

    def norm(self, norm: Affine, sums: Tensor) -> None:
        """Of a norm; sums [2, W] in float32."""
        if self.wanted:
            dweight, dbias = sums.unbind()
            weight = self._vector(norm.weight, [dweight])
            assert weight is not None
            self.found[id(norm)] = Affine(weight, self._vector(norm.bias, [dbias]))

    def _vector(self, like: Tensor | None, parts: Sequence[Tensor]) -> Tensor | None:
        """A vector's gradient, of float32 parts side by side. A copy, since what an op returns shares no memory."""
        if like is None:
            return None
        gradient = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        copies, sources = self.vectors.setdefault(like.dtype, ([], []))
        copies += [gradient] if len(parts) == 1 else gradient.split([len(part) for part in parts])
        sources += parts
        return gradient

    def modulation(
        self, layer: Affine, by_row: Tensor | None, sums: Sequence[Tensor], last_of_group: bool = True
    ) -> None:
        """Of the linear layer of a modulation, and its part of a's gradient: one product each for all its parts.

        Args:
            layer: that makes it.
            by_row: gradient of its output, row by row, [R, parts * W]; None if `sums` holds it summed.
            sums: of shift, scale (and gate), float32 [C, 1, W] each; [1, 1, W] beside `by_row`.
            last_of_group: whether no further block shares the layer; until then gradients are only summed.
        """
        if self.pass_.form.modulation_order == "scale-shift-gate":
            sums = [sums[1], sums[0], *sums[2:]]
        if by_row is not None and last_of_group and self.group is None:
            dmodulation, dbias = self.which.to_conditions(by_row), [part.view(-1) for part in sums]
        else:
            summed = torch.cat(list(sums), 1).flatten(1)  # [C or 1, parts * W]
            dmodulation = summed.to(self.pass_.x.dtype) if by_row is None else self.which.to_conditions(by_row)
            if self.group is not None:
                dmodulation, summed = dmodulation + self.group[0], summed + self.group[1]  # which may be one tensor
            self.group = None if last_of_group else (dmodulation, summed)
            dbias = [_over_rows(summed)] if last_of_group else []
        if last_of_group:
            of_a = self.of_a
            self.of_a = dmodulation @ layer.weight if of_a is None else of_a.addmm_(dmodulation, layer.weight)
            self.affine(layer, dmodulation, self.pass_.layers.a, dbias)

    def in_order(self) -> list[Tensor]:
        """Those of the weights that are there, in their order; none if they are not wanted."""
        if not self.wanted:
            return []
        for copies, sources in self.vectors.values():
            foreach_copy_(copies, sources)
        layers = self.pass_.layers
        affines = in_order(self.pass_.blocks, layers.groups, layers.final)
        gradients = [self.found[id(affine)] for affine in affines if affine[0] is not None]
        return [tensor for pair in gradients for tensor in pair if tensor is not None]


def _over_rows(sums: Tensor) -> Tensor:
    """[C, ...] -> [...]: over what there is of each condition."""
    return sums[0] if len(sums) == 1 else sums.sum(0)


def _unit_strides(norm: Affine) -> Affine:
    if all(vector is None or vector.stride(0) == 1 for vector in norm):
        return norm
    return Affine(norm.weight.contiguous(), None if norm.bias is None else norm.bias.contiguous())

"""What a transformer layer launches and moves, counted: numbers that hold on any machine."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.uniflow_kernels import test_mlp
from tests.uniflow_kernels.test_transformer_layers import make, tokens
from uniflow_kernels import backend, compared_residual_norm
from uniflow_kernels.ops import transformer_layers
from uniflow_kernels.ops.distillation import mean_distance
from uniflow_kernels.ops.mlp import mlp
from uniflow_kernels.ops.transformer_layers import LayerForm, fold_norm

pytest.importorskip("triton")
from uniflow_kernels.triton_kernels.launch import Launch

# rows a column as in the base preset with 32 pictures of 1025 tokens: 32
BATCH, LENGTH, WIDTH = 2, 1025, 64
TENSOR = BATCH * LENGTH * WIDTH * 2  # bytes, of [rows, width] in bfloat16
VIEWS = ("view", "reshape", "detach", "empty", "chunk", "split", "slice", "unflatten", "aten.t.", "transpose", "alias")
OPS = ("uniflow_kernels.",)  # whose launches are counted inside


class Counted(TorchDispatchMode):
    """What works on elements, and the bytes of the tensors that it is given and gives."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def note(self, name, *tensors):
        self.names.append(name)
        self.bytes += sum({id(t): t.nbytes for t in tensors if isinstance(t, torch.Tensor)}.values())

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if not any(part in str(function) for part in VIEWS + OPS):
            self.note(str(function), *arguments, *(made if isinstance(made, tuple) else (made,)))
        return made


def attend(qkv):
    """In the place of attention: one pass that reads queries, keys and values and writes as much as one of them."""
    return qkv.unflatten(-1, (3, -1)).sum(-2)


def a_layer(path, monkeypatch):
    """Launches and bytes of a layer behind others: what two layers need more than one."""
    layers = [layer._replace(attend=attend) for layer in make(WIDTH, 4 * WIDTH, torch.bfloat16)]
    products = [pair for layer in layers for pair in ((layer.norm1, *layer.qkv), (layer.norm2, layer.fc1))]
    kept = {id(affine.weight): fold_norm(norm, affine) for norm, affine in products}  # as between calls
    monkeypatch.setattr(transformer_layers, "packed", lambda _, sources, build: kept[id(sources[2])])
    x, found = tokens((BATCH, LENGTH, WIDTH), torch.bfloat16), []
    for number in (1, 2):
        with monkeypatch.context() as patched, Counted() as counted, backend("triton"), torch.no_grad():

            def note(launch, grid, describe=None, /, counted=counted, **arguments):
                counted.note(launch.kernel.__name__, *arguments.values())

            patched.setattr(Launch, "__call__", note)
            list(transformer_layers.transformer_layers(x, layers[:number], LayerForm(), path))
        found.append(counted)
    one, two = found
    return len(two.names) - len(one.names), two.bytes - one.bytes, two.names


def test_by_products_a_layer_is_five_launches_and_moves_little_more_than_half(monkeypatch):
    """Against the release's operations: residual and LayerScale apart, as this definition has them."""
    launches, moved, names = a_layer("products", monkeypatch)
    assert launches == 5
    products = ["folded_norm_kernel", "aten.sum.dim_IntList", "residual_product_kernel"]
    assert names == ["moments_kernel", *(products + products[::2]) * 2]
    launches, of_eager, _ = a_layer("eager", monkeypatch)
    assert launches == 12
    assert moved <= 0.55 * of_eager
    # qkv 4, attention 4, projection 3, MLP 5 and 6; weights 0.4; moments, four times, an eighth (at 1024 a sixteenth)
    assert moved / TENSOR == pytest.approx(22.9, abs=0.1)


def test_by_rows_a_layer_is_eight_launches(monkeypatch):
    launches, moved, _ = a_layer("rows", monkeypatch)
    assert launches == 8
    # products and attention 4 + 4 + 2 + 5 + 5, GELU 8, and each residual with its norm 4
    assert moved / TENSOR == pytest.approx(36.4, abs=0.2)


def between_layers(together, monkeypatch):
    """Launches and bytes of both passes where a layer's last residual, the next one's norm and a distance are made."""
    x, q, teacher, ds, dh = (tokens((BATCH, LENGTH, WIDTH), torch.bfloat16) for _ in range(5))
    gate, weight, bias = (torch.ones(WIDTH, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    x, q = x.requires_grad_(), q.requires_grad_()
    with monkeypatch.context() as patched, Counted() as counted, backend("triton"):

        def note(launch, grid, describe=None, /, **arguments):
            counted.note(launch.kernel.__name__, *torch.utils._pytree.tree_leaves(arguments))

        patched.setattr(Launch, "__call__", note)
        if together:
            made = compared_residual_norm(x, q, gate, teacher=teacher, skip_tokens=1, weight=weight, bias=bias)
        else:
            s = torch.addcmul(x, q, gate)
            made = s, F.layer_norm(s, (WIDTH,), weight, bias), mean_distance(s, teacher, 1)
        torch.autograd.backward(made, [ds, dh, torch.tensor(0.5)])
    return counted


def test_comparing_where_layers_meet_moves_half_as_much(monkeypatch):
    """In a launch each way; of what the distance costs beside sum and norm, the teacher read twice is left."""
    apart, together = (between_layers(how, monkeypatch) for how in (False, True))
    kernels = [name for name in together.names if name.endswith("kernel")]
    assert kernels == ["compared_norm_kernel", "compared_norm_backward_kernel"]
    # x, q and teacher to sum and norm; both gradients, sum, q and teacher to two gradients; partial sums
    assert together.bytes / TENSOR == pytest.approx(12.5, abs=0.1)
    # sum 3, norm 2, distances with their gradients 3; weighing these 1, in place; norm 3, additions 6, LayerScale 8
    assert apart.bytes / TENSOR == pytest.approx(26.1, abs=0.1)


def test_the_release_moves_twice_as_much(monkeypatch):
    _, moved, _ = a_layer("eager", monkeypatch)
    # norms 2 + 2, products and attention 20, GELU 8, LayerScale 2 + 2 and residuals 3 + 3
    assert moved / TENSOR == pytest.approx(42.4, abs=0.1)


def test_the_mlps_around_the_latent_move_half(monkeypatch):
    """Of [rows, width] as their inner layers, the latent a sixteenth; the position is one picture's."""
    x, fc1, fc2, _ = test_mlp.make(WIDTH, WIDTH, WIDTH // 16, torch.bfloat16, shape=(BATCH, LENGTH - 1))
    back = test_mlp.make(WIDTH // 16, WIDTH, WIDTH, torch.bfloat16, shape=(BATCH, LENGTH - 1))
    moved = {}
    for path in ("auto", "products"):
        with monkeypatch.context() as patched, Counted() as counted, backend("triton"), torch.no_grad():

            def note(launch, grid, describe=None, /, counted=counted, **arguments):
                counted.note(launch.kernel.__name__, *arguments.values())

            patched.setattr(Launch, "__call__", note)
            mlp(x, fc1, fc2, path=path)
            mlp(*back[:3], position=back[3], path=path)
        moved[path] = counted.bytes / TENSOR, len(counted.names)
    assert moved["auto"] == (pytest.approx(12.7, abs=0.1), 7)
    assert moved["products"] == (pytest.approx(6.7, abs=0.1), 4)

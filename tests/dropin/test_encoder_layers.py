"""Layers of vision transformers: transformers' own code, timm's, and stand-ins of those and of InternViT."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import randomize
from tests.dropin.stand_ins import rows
from tests.dropin.test_attentions import EncoderLayer as InternViTLayer
from tests.dropin.test_attentions import FusedAttention, NaiveAttention
from tests.dropin.test_heads import compare
from tests.uniflow.test_pretrained import hidden_states, hugging_face, images  # noqa: F401 - a fixture
from uniflow.huggingface import layers_of
from uniflow_kernels import backend, cpu_kernels, patch, unpatch, verify
from uniflow_kernels.dropin import encoder_layers, verification
from uniflow_kernels.ops import transformer_layers as op
from uniflow_kernels.torch_private import has_one_dnn, one_dnn_linear

pytest.importorskip("triton")
from uniflow_kernels.triton_kernels import products

WIDTH, HEAD = 32, 16


# --------------------------------------------------------------------------------------------------------- stand-ins


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        kept = torch.rand(len(x), *(1,) * (x.ndim - 1)) >= self.drop_prob
        return x * kept / (1 - self.drop_prob)


class TimmAttention(FusedAttention):
    """With norms of each head's queries and keys, and one of what attention makes."""

    def __init__(self):
        super().__init__(norm="head")
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))


class TimmMlp(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(drop)
        self.fc2, self.drop2 = nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class TimmBlock(nn.Module):
    """timm's `Block`."""

    def __init__(self, drop_path=0.0, drop=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), TimmAttention()
        self.ls1, self.drop_path1 = LayerScale(), DropPath(drop_path)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), TimmMlp(drop)
        self.ls2, self.drop_path2 = LayerScale(), DropPath(drop_path)

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MaskedBlock(TimmBlock):
    """With attention that writes its scores."""

    def __init__(self):
        super().__init__()
        self.attn = NaiveAttention(WIDTH)

    def forward(self, x, mask=None):
        x = x + self.ls1(self.attn(self.norm1(x), mask))
        return x + self.ls2(self.mlp(self.norm2(x)))


def timm_block(**options):
    block = pytest.importorskip("timm.models.vision_transformer").Block
    return block(WIDTH, 2, mlp_ratio=2, qkv_bias=True, **options)


def of_transformers(kind, **changes):
    return lambda: layers_of(hugging_face(kind, **changes))[0]


RMS = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True}
NO_BIAS = {"query_bias": False, "value_bias": False, "mlp_bias": False, "proj_bias": False}
# a layer, and how the report says what it is
FAMILIES = {
    "ViT": (of_transformers("ViT"), "layer norm, no LayerScale, gelu)"),
    "DINOv2": (of_transformers("Dinov2", drop_path_rate=0.1), "layer norm, LayerScale, gelu)"),
    "DINOv2 with registers": (of_transformers("Dinov2WithRegisters"), "layer norm, LayerScale, gelu)"),
    "DINOv2, gated": (of_transformers("Dinov2", use_swiglu_ffn=True), "LayerScale); .* its MLP is not two products"),
    "DINOv3": (of_transformers("DINOv3ViT"), "layer norm, LayerScale, gelu)"),
    "DINOv3 without biases": (of_transformers("DINOv3ViT", **NO_BIAS), "layer norm, LayerScale, gelu)"),
    "CLIP": (of_transformers("CLIPVision"), "layer norm, no LayerScale, quick_gelu)"),
    "SigLIP": (of_transformers("SiglipVision"), "layer norm, no LayerScale, gelu_pytorch_tanh)"),
    "SigLIP 2": (of_transformers("Siglip2Vision"), "layer norm, no LayerScale, gelu_pytorch_tanh)"),
    "InternVL": (of_transformers("InternVLVision"), "layer norm, LayerScale, gelu)"),
    "InternVL, rms": (of_transformers("InternVLVision", **RMS), "rms norm, LayerScale, gelu)"),
    "AIMv2": (of_transformers("Aimv2Vision"), "rms norm, no LayerScale); .* its MLP is not two products"),
    "timm's, a stand-in": (TimmBlock, "layer norm, LayerScale, gelu)"),
    "InternViT's, a stand-in": (InternViTLayer, "layer norm, LayerScale, gelu)"),
    "timm": (timm_block, "layer norm, no LayerScale, gelu)"),
    "timm, with all": (
        lambda: timm_block(init_values=0.1, qk_norm=True, drop_path=0.1),
        "layer norm, LayerScale, gelu)",
    ),
}
EVERY = pytest.mark.parametrize("name", FAMILIES)


def made(name, dtype=torch.float32):
    return randomize(FAMILIES[name][0]()).eval().to(dtype)


def others(layer, length, dtype):
    """What it needs beside x: transformers' DINOv3 is told where the tokens lie, behind one that lies nowhere."""
    parameters = inspect.signature(type(layer).forward).parameters
    angles = rows(length - 1, HEAD, seed=4).to(dtype)
    given = {"attention_mask": None, "position_embeddings": (angles.cos(), angles.sin())}
    return {name: value for name, value in given.items() if name in parameters}


@pytest.fixture
def not_its_own(monkeypatch):
    """That the layer's own forward does not run."""

    def check(layer):
        @functools.wraps(type(layer).forward)
        def unused(*_, **__):
            raise AssertionError("its own forward ran")

        monkeypatch.setattr(type(layer), "forward", unused)

    return check


@pytest.fixture
def by_definition(monkeypatch):
    """Without gradients what is found in a layer is computed by the definition of `transformer_layers`."""
    ran = []

    def run(x, layers, form, path, more_follow):
        ran.append(path)
        return iter([op.plain_layer(x, layers[0], form)])

    monkeypatch.setattr(encoder_layers, "transformer_layers", run)
    return ran


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY
def test_numbers_without_gradients(name, dtype, within_twice, by_definition, not_its_own):
    layer, x = made(name, dtype), rows(3, 17, WIDTH).to(dtype)
    given, keys = others(layer, 17, dtype), list(layer.state_dict())
    with torch.no_grad():
        before = layer(x, **given)
        exact = copy.deepcopy(layer).double()(x.double(), **others(layer, 17, torch.float64))
        report = patch(layer, strict=True)
        assert re.search(FAMILIES[name][1].replace(")", r"\)"), report.patched[""])
        with backend("eager"):
            assert "attn" in report.patched or torch.equal(layer(x, **given), before)
        not_its_own(layer)
        with backend("triton"):
            after = layer(x, **given)
    within_twice(after, before, exact)
    assert after.dtype == dtype
    assert by_definition == ([] if "not two products" in FAMILIES[name][1] else ["rows"])
    assert list(layer.state_dict()) == keys


@EVERY
def test_products_by_one_dnn(name, within_twice, monkeypatch):
    """As on AMD's processors, whatever this is; with a gradient the layer's own forward runs."""
    if not has_one_dnn():
        pytest.skip("torch is built without oneDNN or MKL")
    monkeypatch.setattr(cpu_kernels, "is_amds", lambda: True)
    layer, x = made(name), rows(3, 17, WIDTH)
    given, asked = others(layer, 17, torch.float32), []
    monkeypatch.setattr(op, "_WORTH_ONE_DNN", 0)
    monkeypatch.setattr(op, "one_dnn_linear", lambda *given: asked.append(1) or one_dnn_linear(*given))
    with torch.no_grad():
        before, exact = layer(x, **given), copy.deepcopy(layer).double()(x.double(), **others(layer, 17, torch.float64))
        patch(layer, strict=True)
        after = layer(x, **given)
    within_twice(after, before, exact)
    count = 0 if "not two products" in FAMILIES[name][1] else 4
    assert len(asked) == count
    layer(x, **given).sum().backward()
    assert len(asked) == count


@EVERY
def test_gradients(name, within_twice, not_its_own):
    """In training, with what lies between attention and MLP as one operation."""
    layer, x = made(name), rows(2, 5, WIDTH)

    def found(layer, dtype):
        given, leaf = others(layer, 5, dtype), x.to(dtype).requires_grad_()
        out = layer.eval()(leaf, **given)
        leaves = {"x": leaf, **dict(layer.named_parameters())}
        gradients = torch.autograd.grad((out * rows(*out.shape, seed=2)).sum(), list(leaves.values()))
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    before, exact = found(layer, torch.float32), found(copy.deepcopy(layer).double(), torch.float64)
    patch(layer, strict=True)
    not_its_own(layer)
    with backend("triton"):
        after = found(layer, torch.float32)
    compare(after, before, exact, within_twice, floor=2e-6)


PATHS = {"InternVL, rms": "products", "DINOv3 without biases": "small products", "CLIP": "rows"}


@pytest.mark.parametrize("name", PATHS)
def test_numbers_of_the_kernels(name, within_twice, not_its_own, monkeypatch):
    """What the products left of the rows that one layer returned serves the next; and not, where these were changed."""
    layer, x, path = made(name), rows(2, 5, WIDTH), PATHS[name]
    model = nn.ModuleList([layer, copy.deepcopy(layer)])
    wide = copy.deepcopy(model).double()

    def run(model, x, change=0.0):
        given = others(model[0], 5, x.dtype)
        x = model[0](x, **given)
        x += change
        return model[1](x, **given)

    with torch.no_grad():
        before = [run(model, x, change) for change in (0.0, 0.5)]
        exact = [run(wide, x.double(), change) for change in (0.0, 0.5)]
    patch(model, strict=True)
    asked, moments = [], products.moments
    monkeypatch.setattr(products, "moments", lambda *given: asked.append(1) or moments(*given))
    monkeypatch.setattr(encoder_layers, "choose_layers_path", lambda *given: op.choose_layers_path(*given, path))
    not_its_own(layer)
    with backend("triton"), torch.no_grad():
        kept = model[0](x, **others(layer, 5, x.dtype))
        first = [model[1](kept, **others(layer, 5, x.dtype)) for _ in range(2)]
        assert len(asked) == (0 if path == "rows" else 1)
        changed = run(model, x, 0.5)
        assert len(asked) == (0 if path == "rows" else 3)  # of x, and of what was changed
    assert torch.equal(*first)
    within_twice(first[0], before[0], exact[0])
    within_twice(changed, before[1], exact[1])
    assert len(op._left) == (0 if path == "rows" else 4)  # of all outputs that are still there
    del kept, first, changed
    assert len(op._left) == 0
    if name == "CLIP":
        return
    with backend("triton"), torch.inference_mode():  # where no change can be seen
        within_twice(run(model, x, 0.5), before[1], exact[1])


# ------------------------------------------------------------------------------------------ what its own forward does


@pytest.fixture
def own_forwards(monkeypatch):
    """The layers whose own forward ran."""
    ran = []

    def watch(layer):
        own = type(layer).forward

        @functools.wraps(own)
        def noted(self, *args, **kwargs):
            ran.append(self)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(type(layer), "forward", noted)
        return ran

    return watch


def test_a_dropped_path(by_definition, own_forwards):
    """In training the layer's own forward drops, with its own random numbers; in eval mode nothing is dropped."""
    block, x = randomize(TimmBlock(drop_path=0.5)), rows(8, 5, WIDTH)
    torch.manual_seed(1)
    expected = block(x)
    patch(block, strict=True)
    ran = own_forwards(block)
    with backend("triton"), torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(block(x), expected)
        assert (ran, by_definition) == ([block], [])
        block.eval()(x)
        assert (ran, by_definition) == ([block], ["rows"])


def test_dropout_inside_the_mlp(by_definition, not_its_own):
    """In training the MLP is called, which drops with its own random numbers."""
    block, x = randomize(TimmBlock(drop=0.5)), rows(8, 5, WIDTH)
    torch.manual_seed(1)
    expected = block(x)
    patch(block, strict=True)
    not_its_own(block)
    with backend("triton"), torch.no_grad():
        torch.manual_seed(1)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
        assert by_definition == []
        block.eval()(x)
    assert by_definition == ["rows"]


def test_masks_reach_the_attention(by_definition, not_its_own):
    layer, x = made("SigLIP 2"), rows(2, 5, WIDTH)
    mask = torch.zeros(2, 1, 1, 5).masked_fill(torch.arange(5) > 2, -1e9)
    with torch.no_grad():
        expected = layer(x, mask)
        patch(layer, strict=True)
        not_its_own(layer)
        with backend("triton"):
            torch.testing.assert_close(layer(x, mask), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer(x, attention_mask=mask), expected, rtol=1e-5, atol=1e-5)
    assert by_definition == ["rows"] * 2


def test_a_mask_of_attention_that_writes_its_scores(by_definition, not_its_own):
    """Without it the operation stands for the attention, with it the attention's own code between its products."""
    block, x = randomize(MaskedBlock()).eval(), rows(2, 5, WIDTH)
    mask = torch.zeros(5, 5).masked_fill(torch.arange(5) > 2, -1e9)
    with torch.no_grad():
        expected = [block(x), block(x, None), block(x, mask)]
        assert set(patch(block).patched) == {"", "attn"}
        not_its_own(block)
        with backend("triton"):
            for found, before in zip((block(x), block(x, None), block(x, mask)), expected, strict=True):
                torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)
    assert by_definition == ["rows"] * 3
    assert not torch.allclose(expected[0], expected[2], atol=1e-2)


def test_arguments_that_are_not_known(own_forwards):
    layer, x = made("timm's, a stand-in"), rows(2, 5, WIDTH)
    patch(layer, strict=True)
    ran = own_forwards(layer)
    with backend("triton"), pytest.raises(TypeError, match="head_mask"):
        layer(x, head_mask=None)
    with backend("triton"), pytest.raises(TypeError, match="missing"):
        layer()
    assert ran == [layer, layer]


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_attentions_and_hidden_states(kind, images):  # noqa: F811
    """What transformers notes by hooks comes out as before, on the first call and on later ones."""
    model = randomize(hugging_face(kind))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(images, output_attentions=True, output_hidden_states=True)
        model = randomize(hugging_face(kind))
        model.set_attn_implementation("eager")
        assert len(patch(model).patched) == 2
        with backend("triton"):
            for _ in range(2):
                found = model(images, output_attentions=True, output_hidden_states=True)
                for name in ("attentions", "hidden_states"):
                    assert len(found[name]) == len(expected[name])
                    for ours, theirs in zip(found[name], expected[name], strict=True):
                        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(patch(copy.deepcopy(model)).patched) == 2  # the hooks that stay are no hindrance


def test_hooks(by_definition, own_forwards):
    """One on attention or the MLP fires, which then are called; with one on what is not called its own forward runs."""
    layer, x, fired = made("ViT"), rows(2, 5, WIDTH), []
    with torch.no_grad():
        expected = layer(x)
        patch(layer, strict=True)
        ran = own_forwards(layer)
        with backend("triton"):
            for part in (layer.attention, layer.mlp.fc1, layer.layernorm_before, layer):
                handle = part.register_forward_hook(lambda *_: fired.append(1))
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
                handle.remove()
            assert (len(fired), ran, by_definition) == (4, [], ["rows"])  # a hook on the layer itself is around all
            layer.layernorm_after.register_forward_hook(lambda *_: fired.append(1))
            assert torch.equal(layer(x), expected)
    assert (len(fired), ran) == (5, [layer])


def test_gradient_checkpointing_autocast_and_mixed_dtypes(own_forwards):
    layer, x = made("DINOv2 with registers").train(), rows(2, 5, WIDTH)
    patch(layer, strict=True)
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    ran = own_forwards(layer)
    with backend("triton"):
        layer(x.requires_grad_()).sum().backward()
        assert ran == [layer]
        layer.gradient_checkpointing = False
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
            assert out.dtype == torch.float32
            unpatch(layer)
            torch.testing.assert_close(out, layer(x), rtol=2e-2, atol=2e-2)
        patch(layer)
        ran.clear()
        layer.norm2.bfloat16()
        with pytest.raises(RuntimeError):
            layer(x)
        assert ran == [layer]


def test_parts_that_are_replaced(by_definition, own_forwards):
    """An adapter on a product is called with the attention around it; another norm has the layer's own forward run."""
    layer, x = made("DINOv2"), rows(2, 5, WIDTH)

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    patch(layer, strict=True)
    ran = own_forwards(layer)
    adapted = Adapted(WIDTH, WIDTH)
    adapted.load_state_dict(layer.attention.o_proj.state_dict())
    layer.attention.o_proj = adapted
    with torch.no_grad():
        expected = copy.deepcopy(layer)
        unpatch(expected)
        expected = expected(x)
        ran.clear()
        with backend("triton"):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
            assert ran == by_definition == []
            layer.norm2 = nn.RMSNorm(WIDTH)
            layer(x)
    assert ran == [layer]


def test_copies_pickles_and_unpatch(by_definition):
    model, x = randomize(nn.ModuleList([TimmBlock(), InternViTLayer()])).eval(), rows(2, 5, WIDTH)
    with torch.no_grad():
        expected = [layer(x) for layer in model]
        report = patch(model, strict=True)
        assert str(patch(model)) == str(report)
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with backend("triton"):
                for layer, before in zip(one, expected, strict=True):
                    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
            unpatch(one)
            assert all(map(torch.equal, (layer(x) for layer in one), expected))
            assert not any("forward" in vars(part) for part in one.modules())
    assert by_definition == ["rows"] * 4


def test_compiles_whole():
    layer, x = made("ViT"), rows(2, 5, WIDTH)
    expected = layer(x)
    patch(layer, strict=True)
    torch._dynamo.reset()
    with backend("triton"):
        out = torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_mode_that_counts_sees_all_products(by_definition):
    layer, x = made("ViT").requires_grad_(False), rows(2, 5, WIDTH)
    counts = []
    for _ in range(2):
        with backend("triton"), FlopCounterMode(display=False) as counter:
            layer(x)
        counts.append(counter.get_total_flops())
        patch(layer, strict=True)
    assert counts[0] == counts[1] > 0
    assert by_definition == []


def test_is_verified(monkeypatch):
    monkeypatch.setattr(verification, "SECONDS", 0.0)
    report = verify(made("DINOv2"), rows(2, 5, WIDTH).requires_grad_())
    assert report.ok
    assert "without gradients all by what was measured to be the fastest" in str(report)


# ------------------------------------------------------------------------------------------------------- look-alikes


class PostNorm(TimmBlock):
    def forward(self, x):
        x = x + self.ls1(self.norm1(self.attn(x)))
        return x + self.ls2(self.norm2(self.mlp(x)))


class Parallel(TimmBlock):
    def forward(self, x):
        return x + self.ls1(self.attn(self.norm1(x))) + self.ls2(self.mlp(self.norm2(x)))


class Scaled(TimmBlock):
    def forward(self, x):
        x = x + 0.5 * self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class FurtherTerm(TimmBlock):
    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return 1.01 * x + self.ls2(self.mlp(self.norm2(x)))


class TrainsOtherwise(TimmBlock):
    def forward(self, x):
        return super().forward(x if self.training else 0.9 * x)


class Noisy(TimmBlock):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn_like(x)


class OtherNorm(TimmBlock):
    def __init__(self):
        super().__init__()
        self.norm2 = type(
            "ScaledNorm", (nn.LayerNorm,), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)}
        )(WIDTH)


class Causal(TimmBlock):
    def __init__(self):
        super().__init__()
        self.attn.is_causal = True


LOOK_ALIKES = {
    "post-norm": (PostNorm, "is not added to x as it is, nor with LayerScale"),
    "parallel": (Parallel, "is not added to x as it is, nor with LayerScale"),
    "scaled": (Scaled, "what attn makes is not added to x as it is"),
    "a term": (FurtherTerm, "what mlp makes is not added to x as it is"),
    "training": (TrainsOtherwise, "another way in training"),
    "noise": (Noisy, "draws random numbers"),
    "norm": (OtherNorm, "norm2: a ScaledNorm, neither a layer norm nor an rms norm"),
    "causal": (Causal, "its attention is causal"),
}


@pytest.mark.parametrize("which", LOOK_ALIKES)
def test_a_look_alike_is_left_alone(which):
    make, why = LOOK_ALIKES[which]
    block = make()
    assert why in patch(block).left_alone[""]
    assert "forward" not in vars(block)


class GatedAttention(TimmAttention):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) * self.gate(x).sigmoid()


class Residual(TimmAttention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) + 0.1 * x


class Looks(TimmAttention):
    """At what is given to its linear layer, beside calling it."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x * x.square().mean(-1, keepdim=True).clamp(max=0.5))


class NormedMlp(TimmMlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2 * WIDTH)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


class OtherActivation(TimmMlp):
    def __init__(self):
        super().__init__()
        self.act = nn.Mish()


PRODUCTS = {
    "a gate": ("attn", GatedAttention, "other products than queries, keys and values"),
    "a residual": ("attn", Residual, "does something else with its input"),
    "it looks": ("attn", Looks, "more with its input"),
    "a norm in the MLP": ("mlp", NormedMlp, "its MLP is not two products with an activation between them"),
    "activation": ("mlp", OtherActivation, "its MLP's activation is none of gelu, gelu_pytorch_tanh, relu, silu"),
}


@pytest.mark.parametrize("which", PRODUCTS)
def test_products_that_stay_as_they_are(which, not_its_own):
    """Attention and MLP may be anything: residual and norm between them are served."""
    name, make, why = PRODUCTS[which]
    block, x = TimmBlock().eval(), rows(2, 5, WIDTH)
    setattr(block, name, make().eval())
    randomize(block)
    with torch.no_grad():
        expected = block(x)
        assert re.search(f"its products as they are: .*({why})", patch(block, strict=True).patched[""])
        not_its_own(block)
        with backend("triton"):
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu", "gelu_new"])
def test_activations_are_told_apart(act):
    """Also where the layer is wide, and two forms of GELU are nearly the same beside the largest number."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "hidden_act": act}
    layer = transformers.models.siglip.modeling_siglip.SiglipEncoderLayer(transformers.SiglipVisionConfig(**sizes))
    layer.self_attn.config._attn_implementation = "sdpa"
    name = {"gelu_new": "gelu_pytorch_tanh"}.get(act, act)
    assert f"no LayerScale, {name})" in patch(layer).patched[""]


def test_what_is_no_such_layer_is_not_spoken_of():
    others = [nn.TransformerEncoderLayer(WIDTH, 2, 64, norm_first=True), nn.Sequential(TimmMlp(), TimmMlp())]
    assert [encoder_layers.recognise(other) for other in others] == [None, None]

"""torch.compile and torch.export: whole graphs, one for all batches and sizes."""

import pytest
import torch
from torch.export import Dim, export


class Method(torch.nn.Module):
    """A method of a model as a module, which is what torch.export takes."""

    def __init__(self, model, name, **how):
        super().__init__()
        self.model, self.name, self.how = model, name, how

    def forward(self, x, start=None, height=None, width=None):
        how = dict(self.how)
        if start is not None:
            how["seed" if start.dtype == torch.int64 else "noise"] = start
        if height is not None:
            how["size"] = (height, width)
        return getattr(self.model, self.name)(x, **how)


BATCH = Dim("batch", max=64)
SHAPES = [(4, 20, 28), (2, 16, 16), (1, 32, 12)]  # of the trained size, and of one picture too


def inputs(what, batch, height, width):
    """Of a method, for a batch of pictures of a size."""
    tokens = height * width // 16
    images, latents = torch.randn(batch, 3, height, width), torch.randn(batch, tokens, 8)
    seeds, noise = torch.arange(batch) + 7, torch.randn(batch, tokens, 48)
    return {
        "encode": (images,),
        "forward": (images, seeds),
        "decode squares": (latents, seeds),
        "decode": (latents, noise, height, width),
    }[what]


def shapes_of(what):
    return [(batch, height, height) for batch, height, _ in SHAPES] if "squares" in what else SHAPES


def method(tiny, what):
    how = {"steps": 2, "cfg": 2.0, "solver": "heun"} if what == "decode" else {}
    return Method(tiny(num_hidden_layers=1, num_decoder_layers=1), what.split()[0], **how)


@torch.no_grad()
def test_one_exported_program_serves_every_batch_and_size(tiny):
    """Of decoding with all that it takes; test_onnx.py has encoding."""
    plain = method(tiny, "decode")
    dynamic = ({0: BATCH, 1: Dim.AUTO}, {0: BATCH, 1: Dim.AUTO}, Dim.DYNAMIC, Dim.DYNAMIC)
    program = export(plain, inputs("decode", *SHAPES[0]), dynamic_shapes=dynamic).module()
    for shape in SHAPES:
        given = inputs("decode", *shape)
        assert torch.allclose(program(*given), plain(*given), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("what", ["forward", "decode squares"])
def test_one_compiled_graph_serves_every_batch_and_size(tiny, what):
    plain, graphs = method(tiny, what), []
    compiled = torch.compile(
        plain, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for shape in shapes_of(what):
        if shape[0] > 1:  # PyTorch makes another graph for a size of one
            given = inputs(what, *shape)
            assert torch.allclose(compiled(*given), plain(*given), atol=1e-4)
    assert len(graphs) == 1


def test_compiled_code_draws_new_noise_and_has_gradients(tiny):
    model = tiny(num_hidden_layers=1, num_decoder_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    one, two = (compiled(torch.ones(2, 3, 16, 16)) for _ in range(2))
    assert not torch.equal(one, two)
    one.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_program_draws_from_no_generator(tiny):
    plain = Method(tiny(num_hidden_layers=1), "decode", seed=5)
    with pytest.raises(ValueError, match=r"^generator, seed: an exported program draws from none; expected seeds"):
        export(plain, (torch.zeros(2, 16, 8),))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_tracing_is_refused(tiny, what):
    with pytest.raises(NotImplementedError, match=r"^torch.jit.trace: .* torch.export.export"):
        torch.jit.trace(method(tiny, what), tuple(map(torch.as_tensor, inputs(what, 2, 16, 16))))

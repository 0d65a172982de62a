"""The products of the flow head and of transformer layers in every tile, compiled for GPUs that are not there."""

import pytest

pytest.importorskip("triton")

from tests.compile.compiling import ARCHES, Request, compile_all, is_oldest
from uniflow_kernels.triton_kernels import flow_products, layer_products, products

pytestmark = pytest.mark.slow

W = H = 1024
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a block of threads may have
# of the tiles of sm_80 on GPUs that have less of it, or of those with TMA, the ones that need the most
LARGEST = {86: ("up",), 89: ("down",), 120: ("modulated", "down backward")}
# per thread; no more than these were needed when the kernels were written
REGISTERS = {
    "folded": 232,
    "residual": 232,
    "modulated": 232,
    "up": 216,
    "gated up": 210,
    "down": 236,
    "down backward": 240,
    "gated down backward": 244,
    "layer's down backward": 244,
}
# on sm_90, with a sigmoid by tanh that is made once; by exp 2968, 2112, 5672 and 4056, and with GELU by erf 5552
INSTRUCTIONS = {
    **{"folded": 2320, "up": 1824, "gated up": 1552, "down backward": 2920, "gated down backward": 2584},
    "layer's down backward": 3800,  # with the derivative of GELU's polynomial, made once
}
PAIRS = ("modulated", "gated up")


# of an MLP that is no layer's: without a norm before it, and with positions behind it
OF_MLP = {
    "folded": {"sums_p": None, "moments_p": None, "PART": 0, "RMS": True},
    "residual": {"x_p": None, "scale_p": None, "moments_p": None},
}


def request(name, arch, small=False, of_mlp=False):
    """A product of a canonical head of width 1024 in bfloat16, which keeps all that training wants, or of a layer."""
    made = products.ARCHITECTURES[arch]
    tma, tiles = made.tma, made.small if small else made.tiles
    tile = tiles[name]
    gated, of_layer = name.startswith("gated"), name.startswith("layer's")
    left, rows = (tile.rows, tile.depth), (tile.rows, tile.piece)
    weight = (2,) * (name in PAIRS) + (tile.columns, tile.depth)
    ups = ("up_p", "dup_p") if gated else ()
    kernel, operands, vectors, constants = {
        "folded": (
            "folded_norm_kernel",
            {"x_p": left, "w_p": weight, "out_p": rows},
            {**dict.fromkeys(("sums_p", "moments_p"), "*fp32"), "bias_p": "*bf16"},
            {"N": 4 * W, "K": W, "PART": tiles["residual"].piece, "ACT": "gelu", "RMS": False},
        ),
        "residual": (
            "residual_product_kernel",
            {"a_p": left, "w_p": weight, **dict.fromkeys(("x_p", "sum_p"), rows)},
            {**dict.fromkeys(("bias_p", "scale_p"), "*bf16"), "moments_p": "*fp32"},
            {"position_p": None, "N": W, "K": 4 * W, "RMS": False},
        ),
        "modulated": (
            "modulation_kernel",
            {"a_p": left, "m_p": weight, **dict.fromkeys(("x_p", "h_p", "scale_p"), rows)},
            {**dict.fromkeys(("mbias_p", "weight_p", "bias_p"), "*bf16"), "moments_p": "*fp32"},
            {"W": W, "PART": tiles["down"].piece, "SCALE_FIRST": False, "RMS": False},
        ),
        "up": (
            "up_kernel",
            {"h_p": left, "w_p": weight, **dict.fromkeys(("p_p", "u_p", *ups[:1]), rows)},
            {"bias_p": "*bf16"},
            {"up_p": None, "H": H, "K": W, "GATED": gated},
        ),
        "down": (
            "down_kernel",
            {
                **{"a_p": left, "g_p": weight, "u_p": left, "w_p": weight},
                **dict.fromkeys(("x_p", "sum_p", "gate_p", "q_p"), rows),
            },
            {**dict.fromkeys(("gbias_p", "bias_p"), "*bf16"), "moments_p": "*fp32"},
            {"W": W, "H": H, "RMS": False},
        ),
        "down backward": (
            "down_backward_kernel",
            {"dq_p": left, "w_p": (tile.depth, tile.columns), **dict.fromkeys(("p_p", "dp_p", "u_p", *ups), rows)},
            {"partial_p": "*fp32"},
            {"up_p": None, "dup_p": None, "H": H, "K": W, "GATED": gated, "ACT": "gelu" if of_layer else "silu"},
        ),
    }[name.removeprefix("gated ").removeprefix("layer's ")]
    if of_mlp:
        operands.pop("x_p" if name == "residual" else "", None)
        constants |= OF_MLP[name]
        constants.pop("position_p", None)
        vectors["position_p"] = "*bf16"
    constants = {name: value for name, value in constants.items() if name not in operands}
    constants |= {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "BP": tile.piece, "TMA": tma}
    described = {
        name: f"tensordesc<bf16[{', '.join(map(str, block))}]>" if tma else "*bf16" for name, block in operands.items()
    }
    strides = [f"{operand.removesuffix('_p')}_s" for operand in operands]
    known = {**dict.fromkeys(strides, "i32"), **described, **vectors, "eps": "fp32"}
    module = layer_products if hasattr(layer_products, kernel) else flow_products
    arguments = getattr(module, kernel).arg_names
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in arguments}
    return Request(f"{module.__name__}:{kernel}", signature, constants, arch, tile.warps, tile.stages)


@pytest.fixture(scope="module")
def both_sizes(oldest):
    asked = [(name, arch, False) for arch in ARCHES for name in products.ARCHITECTURES[arch].tiles]
    if not is_oldest(oldest):
        asked += [(name, arch, False) for arch, names in LARGEST.items() for name in names]
    else:  # all of sm_90, of the others the ones that need the most
        asked = [each for each in asked if each[1] == 90 or "backward" in each[0]]
    asked += [(name, 90, True) for name in products.ARCHITECTURES[90].small]
    return dict(zip(asked, compile_all([request(*each) for each in asked], oldest), strict=True))


def test_the_products_of_an_mlp(oldest):
    for name, result in zip(
        OF_MLP, compile_all([request(name, 90, of_mlp=True) for name in OF_MLP], oldest), strict=True
    ):
        assert result.spills == result.stack == 0, (name, result)
        assert result.registers <= REGISTERS[name], (name, result)
        assert not result.serialised, (name, result)
        assert result.instructions <= INSTRUCTIONS.get(name, 2000), (name, result)


@pytest.fixture
def compiled(both_sizes):
    return {(name, arch): result for (name, arch, small), result in both_sizes.items() if not small}


def test_every_architecture_that_is_shipped_is_compiled():
    assert {arch for arch in products.ARCHITECTURES if arch} == {*ARCHES, *LARGEST} == set(SHARED)
    for arch, names in LARGEST.items():
        assert products.ARCHITECTURES[arch].tiles == products.ARCHITECTURES[80].tiles
        assert set(names) <= products.ARCHITECTURES[arch].tiles.keys()


def test_no_spills_few_registers_and_room_in_shared_memory(compiled):
    for (name, arch), result in compiled.items():
        what = name, arch, result
        assert result.spills == result.stack == 0, what
        assert result.registers <= REGISTERS[name], what
        assert result.shared <= SHARED[arch] << 10, what


def test_two_blocks_of_small_tiles_fit_a_multiprocessor(both_sizes):
    """Its registers and its shared memory, of which each block also needs 1 KiB for the system."""
    small = products.ARCHITECTURES[90].small
    for name in small:
        what = name, (result := both_sizes[name, 90, True])
        assert result.spills == result.stack == 0, what
        assert not result.serialised, what
        assert 2 * (result.shared + 1024) <= 228 << 10, what
        assert 2 * 32 * small[name].warps * (-(-result.registers // 8) * 8) <= 65536, what
        assert result.shared <= 97 << 10, what
        assert result.registers <= (176 if small[name].warps == 4 else 128), what


def test_few_instructions_around_the_activation(compiled):
    for name, most in INSTRUCTIONS.items():
        result = compiled[name, 90]
        assert result.instructions <= most, (name, result)
        assert result.registers <= 200, (name, result)


def test_tensor_cores_run_one_product_after_the_other(compiled):
    """wgmma as wide as the tile and never serialised; the tensor cores' instructions of each architecture."""
    for (name, arch), result in compiled.items():
        what = name, arch, result
        columns = products.ARCHITECTURES[arch].tiles[name].columns * (2 if name in PAIRS else 1)
        assert not result.serialised, what
        assert set(result.wgmma) == ({f"m64n{columns}k16"} if arch == 90 else set()), what
        assert bool(result.mma) == (arch not in (90, 100)), what
        assert bool(result.tcgen05) == (arch == 100), what


def test_tiles_are_read_and_written_by_tma_or_16_bytes_at_a_time(compiled):
    for (name, arch), result in compiled.items():
        what = name, arch, result
        assert bool(result.tma) == (arch >= 90), what
        if not result.tma:
            assert "STG.E.128" in result.wide, what
        # but for vectors of columns, and for moments and sums of rows, of which there are few
        assert set(result.wide) <= {"LDG.E.128", "STG.E.128", "LDG.E.64", "LDG.E", "STG.E"}, what

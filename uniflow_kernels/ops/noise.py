"""Noise that is never stored: normal numbers that are a function of (seed, offset, element) alone, on every backend.

Philox 4x32-10 (Salmon et al. 2011) turns a counter into four 32-bit integers, Box-Muller turns those into four normals.
The columns of a row are taken four at a time, and a row begins with a counter of its own: element (r, c) of rows of C
columns is number c % 4 of counter r*ceil(C/4) + c//4. The integers are the same on every backend, the
normals within 1e-6.
"""

from __future__ import annotations

import itertools
import math
import operator

import torch
from torch import Tensor

from uniflow_kernels import cpu_kernels, triton_kernels
from uniflow_kernels.ops.registration import kernels_for, register

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK = 1 << 15  # counters at a time on a CPU: what Philox works on then stays in the cache


def noise_seed(generator: torch.Generator | None = None) -> int:
    """A seed for `interpolate` and `velocity_loss`, drawn from a generator, which advances.

    Args:
        generator: on any device; PyTorch's default one for the CPU if not given.

    Returns:
        An integer in [0, 2^63). Give the same one to both functions. A generator on a CPU gives its next number. One on
        a GPU gives the Philox number of its seed at its position, which moves on by 4: the host knows both, so nothing
        waits for the GPU.
    """
    if generator is None or where_drawn(generator, torch.device("cpu")).type == "cpu":
        return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu", generator=generator))
    position = generator.get_offset()
    generator.set_offset(position + 4)  # a position counts 32-bit numbers, and moves in fours
    counter = [torch.tensor(half, dtype=torch.int64, device="cpu") for half in (position & _LOW, position >> 32, 0, 0)]
    low, high = (int(word) for word in philox(counter, generator.initial_seed())[:2])
    return (high << 32 | low) >> 1


def where_drawn(generator: torch.Generator | None, device: torch.device) -> torch.device:
    """Where numbers for `device` are drawn: where the generator is, if there is one.

    Raises:
        TypeError: if it is something else.
    """
    if generator is None:
        return device
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected one torch.Generator, got {type(generator).__name__}")
    return generator.device


def integer_seed(seed: int) -> int:
    """A seed in [0, 2^63), of NumPy's integers too.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is out of range.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        try:
            seed = int(operator.index(seed))
        except TypeError:
            raise TypeError(f"seed: expected an integer, or a tensor of torch.int64, got {seed!r}") from None
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer in [0, 2^63), got {seed}")
    return seed


def seeded_noise(
    rows: int,
    columns: int,
    seed: int | Tensor | torch.Generator,
    offset: int = 0,
    device: torch.device | str = "cpu",
    first_row: int = 0,
) -> Tensor:
    """The normals that `seed` and `offset` stand for.

    Args:
        rows, columns: the shape.
        seed: which sequence, in [0, 2^63); a number, a tensor that holds one (int64, of shape [] or [1], on `device`),
            or a generator to draw one from, which advances. A tensor [S] holds those of S groups of rows / S rows that
            follow each other; the rows of each are counted from `first_row`.
        offset: which part of it, in [0, 2^63): another offset gives other, independent numbers.
        device: where to make them.
        first_row: the number of the first row, in [0, 2^48): rows can be made piece by piece.

    Returns:
        [rows, columns], float32, standard normal, contiguous.

    Raises:
        TypeError: if `seed` is a tensor of another dtype, or no integer.
        ValueError: if `seed`, `offset` or `first_row` is out of range, or `seed` a tensor of another shape or device,
            or its number of seeds does not divide `rows`. What a tensor holds is not looked at, since that would wait
            for its device: all its 64 bits count.
    """
    number, held = seed_of(seed, offset, torch.device(device), first_row, groups=True)
    seeds = torch.full((1,), number, dtype=torch.int64, device=device) if held is None else held
    groups = seeds.shape[0]
    if rows % groups if groups else rows:
        raise ValueError(f"rows: expected as many for each of {groups} seeds, got {rows}")
    return seeded_noise_op(seeds, rows, columns, offset, first_row)


def seed_of(
    seed: int | Tensor | torch.Generator | None,
    offset: int,
    device: torch.device,
    first_row: int = 0,
    groups: bool = False,
) -> tuple[int, Tensor | None]:
    """A seed as a number, or 0 and the tensor that holds it on `device`; raises what `seeded_noise` does.

    The tensor is [], or, with `groups`, [S].
    """
    if not 0 <= offset < 2**63:
        raise ValueError(f"offset: expected an integer in [0, 2^63), got {offset}")
    if not 0 <= first_row < 2**48:  # the counters of its rows then fit into 63 bits
        raise ValueError(f"first_row: expected an integer in [0, 2^48), got {first_row}")
    if seed is None:
        return 0, None
    if isinstance(seed, torch.Generator):
        return noise_seed(seed), None
    if not isinstance(seed, Tensor):
        return integer_seed(seed), None
    if seed.dtype != torch.int64:
        raise TypeError(f"seed: expected a tensor of torch.int64, got {seed.dtype}")
    if seed.shape not in ((), (1,)) and not (groups and seed.ndim == 1):
        expected = "a tensor of shape [S]" if groups else "one number, a tensor of shape [] or [1]"
        raise ValueError(f"seed: expected {expected}, got shape {tuple(seed.shape)}")
    if seed.device.type != device.type or (device.index is not None and seed.device != device):
        raise ValueError(f"seed: expected a tensor on the device it is used on, {device}, got one on {seed.device}")
    return 0, seed.view(-1 if groups else ())


# --- in plain PyTorch ---


def plain_seeded_noise(
    rows: int, columns: int, seed: int | Tensor, offset: int, device: torch.device, first_row: int
) -> Tensor:
    """`seeded_noise` in plain PyTorch; the seed is a number, or a tensor [] or [S]."""
    keys = seed.view(-1, 1) if isinstance(seed, Tensor) else seed
    groups = len(keys) if isinstance(keys, Tensor) else 1
    quads, in_group = -(-columns // 4), rows // max(1, groups)
    noise = torch.empty(groups, in_group, columns, dtype=torch.float32, device=device)
    limit = (_CHUNK if noise.device.type == "cpu" else 1 << 24) // max(1, quads)  # rows
    at_once, in_piece = max(1, limit // max(1, in_group)), max(1, limit)
    for start, top in itertools.product(range(0, groups, at_once), range(0, in_group, in_piece)):
        part = noise[start : start + at_once, top : top + in_piece]
        number = torch.arange(part.shape[1] * quads, dtype=torch.int64, device=device) + (first_row + top) * quads
        number = number.expand(len(part), -1)
        counter = [number & _LOW, number >> 32, number & 0, number & 0]
        counter[2] += offset & _LOW
        counter[3] += offset >> 32
        words = philox(counter, keys[start : start + at_once] if isinstance(keys, Tensor) else keys)
        if columns % 4 == 0:
            box_muller(words, part.view(*number.shape, 4))
        else:
            normals = noise.new_empty(*number.shape, 4)
            box_muller(words, normals)
            part.copy_(normals.view(*part.shape[:2], quads * 4)[..., :columns])
    return noise.view(rows, columns)


def philox(counter: list[Tensor], seed: int | Tensor) -> list[Tensor]:
    """Philox 4x32-10: four int64 tensors of 32-bit counter words to four of 32-bit random words.

    The seed is the key; it may be a tensor of int64 that the words' shape can be made of.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(_ROUNDS):
        # the products of two 32-bit words wrap around in an int64, but no bit of them is lost
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(_LOW)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(_LOW)
        c1, c3 = product1.bitwise_and_(_LOW), product0.bitwise_and_(_LOW)
        key0, key1 = key0 + _KEY_STEPS[0] & _LOW, key1 + _KEY_STEPS[1] & _LOW
    return [c0, c1, c2, c3]


def box_muller(words: list[Tensor], normals: Tensor) -> None:
    """Four int64 tensors [...] of 32-bit words to standard normals, written into `normals` [..., 4].

    Words 0 and 2 give the radius sqrt(-2 ln((x + 1/2) / 2^32)). Words 1 and 3 give the direction: the two upper bits
    the quadrant, the others the angle in it, in [-pi/4, pi/4), where a sine in float32 is exact enough.
    """
    for pair in (0, 2):
        radius = (words[pair].float() * 2**-32).add_(2**-33).log_().mul_(-2).sqrt_()
        quadrant = words[pair + 1] >> 30
        angle = ((words[pair + 1] & 0x3FFFFFFF) - 0x20000000).float().mul_(math.pi / 2**31)
        cosine, sine = angle.cos() * radius, angle.sin_().mul_(radius)
        odd = (quadrant & 1).bool()
        first, second = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
        sign = (1 - (quadrant & 2)).float()
        normals[..., pair] = first.mul_(sign)
        normals[..., pair + 1] = second.mul_(sign)


# --- registered op ---


def _seeded_noise(seeds: Tensor, rows: int, columns: int, offset: int, first_row: int) -> Tensor:
    kernels = kernels_for("seeded_noise", "noise", seeds.device, lambda name: _why_not(name, seeds.device))
    if kernels is None:
        return plain_seeded_noise(rows, columns, seeds, offset, seeds.device, first_row)
    noise = _seeded_noise_fake(seeds, rows, columns, offset, first_row)
    kernels.seeded_noise(seeds.contiguous(), offset, first_row, noise)  # they read it by its address
    return noise


def _why_not(name: str, device: torch.device) -> str | None:
    if name == "triton":
        return triton_kernels.why_not_on(device, torch.float32)
    if name == "cuda":
        return "the CUDA part makes noise where it is used, not by itself"
    return cpu_kernels.why_not_on(device)


def _seeded_noise_fake(seeds: Tensor, rows: int, columns: int, offset: int, first_row: int) -> Tensor:
    return seeds.new_empty(rows, columns, dtype=torch.float32)


seeded_noise_op = register(
    "seeded_noise(Tensor seeds, SymInt rows, SymInt columns, SymInt offset, SymInt first_row) -> Tensor",
    _seeded_noise,
    _seeded_noise_fake,
)

"""Triton kernels for what happens to each token by itself: norms, gates, rotations.

What a row gets depends on that row alone, to the bit.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x,
    weight,
    addend,
    out,
    epsilon,
    x_stride,
    out_stride,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    IS_ONE_WEIGHT: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
):
    """Divides a row by its root mean square and multiplies it by a weight. The grid is (tokens, groups).

    Args:
        x: `[T, GROUPS, SIZE]`; tokens lie `x_stride` numbers apart. With `HAS_ADDEND` it becomes the sum first.
        weight: `float32[SIZE]` where `IS_ONE_WEIGHT`, else `float32[GROUPS, SIZE]`.
        addend: `[T, GROUPS, SIZE]` without gaps; not read where there is none.
        out: of the shape of `x`; tokens lie `out_stride` numbers apart.
        epsilon: added to the mean of the squares.
        x_stride: numbers between two tokens.
        out_stride: numbers between two tokens.
        GROUPS: rows of a token.
        SIZE: of a row.
        SIZE_PADDED: the next power of two.
        IS_ONE_WEIGHT: whether all rows of a token share one.
        HAS_ADDEND: whether there is something to add.
    """
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    elements = tl.arange(0, SIZE_PADDED)
    is_there = elements < SIZE
    place = x + token * x_stride + group * SIZE + elements
    row = tl.load(place, mask=is_there, other=0.0)
    if HAS_ADDEND:
        other = tl.load(addend + (token * GROUPS + group) * SIZE + elements, is_there, other=0.0)
        row = (row.to(tl.float32) + other.to(tl.float32)).to(row.dtype)
        tl.store(place, row, mask=is_there)
    number = row.to(tl.float32)
    mean = tl.sum(number * number, 0) / SIZE
    weights = weight if IS_ONE_WEIGHT else weight + group * SIZE
    factors = tl.load(weights + elements, mask=is_there, other=0.0)
    scaled = number * (1.0 / tl.sqrt(mean + epsilon)) * factors
    target = out + token * out_stride + group * SIZE + elements
    tl.store(target, scaled.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def gate(x, y, SIZE: tl.constexpr, BLOCK: tl.constexpr, IS_SILU: tl.constexpr):
    """Multiplies values by bent gates. The grid is (tokens, blocks of a row).

    Args:
        x: `[T, 2 * SIZE]` without gaps: the gates, then the values.
        y: `[T, SIZE]` without gaps.
        SIZE: of a row.
        BLOCK: numbers of one program.
        IS_SILU: whether gates are bent by SiLU; else by the GELU that is made with a tanh.
    """
    token = tl.program_id(0).to(tl.int64)
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = elements < SIZE
    gates = tl.load(x + token * (2 * SIZE) + elements, mask=is_there, other=0.0).to(tl.float32)
    values = tl.load(x + token * (2 * SIZE) + SIZE + elements, mask=is_there, other=0.0)
    # Both are a product with a logistic function: (1 + tanh(z)) / 2 is that of 2 z.
    slope = gates
    if not IS_SILU:
        slope = 1.5957691216057308 * (gates + 0.044715 * gates * gates * gates)  # 2 √(2/π) …
    bent = gates / (1.0 + tl.exp2(slope * -1.4426950408889634))
    product = bent * values.to(tl.float32)
    tl.store(y + token * SIZE + elements, product.to(y.dtype.element_ty), mask=is_there)


@triton.jit
def rotate(
    heads,
    rotations,
    stride,
    COUNT: tl.constexpr,
    COUNT_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
):
    """Multiplies pairs of numbers, as complex ones, by a token's rotations, in place. One program per token.

    Args:
        heads: `[T, COUNT, PAIRS, 2]`; tokens lie `stride` numbers apart.
        rotations: `float32[T, PAIRS, 2]`, cosines beside sines.
        stride: numbers between two tokens.
        COUNT: heads of a token.
        COUNT_PADDED: the next power of two.
        PAIRS: of a head.
        PAIRS_PADDED: the next power of two.
    """
    token = tl.program_id(0).to(tl.int64)
    rows, pairs = tl.arange(0, COUNT_PADDED), tl.arange(0, PAIRS_PADDED)
    is_pair = pairs < PAIRS
    is_there = (rows < COUNT)[:, None] & is_pair[None, :]
    turns = rotations + (token * PAIRS + pairs) * 2
    cosines = tl.load(turns, mask=is_pair, other=0.0)[None, :]
    sines = tl.load(turns + 1, mask=is_pair, other=0.0)[None, :]
    place = heads + token * stride + (rows[:, None] * PAIRS + pairs[None, :]) * 2
    first = tl.load(place, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(place + 1, mask=is_there, other=0.0).to(tl.float32)
    turned_first = first * cosines - second * sines
    turned_second = first * sines + second * cosines
    tl.store(place, turned_first.to(heads.dtype.element_ty), mask=is_there)
    tl.store(place + 1, turned_second.to(heads.dtype.element_ty), mask=is_there)

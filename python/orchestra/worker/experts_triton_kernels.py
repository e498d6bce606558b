"""Triton kernels for mixtures of experts: all experts' products of a step in one launch, whatever each has to do.

The pairs of token and pick are sorted by expert. An expert's run of them is cut into tiles, and a program finds out by
itself which tile of which expert is its own: the host never learns how many tokens an expert has, so that a step needs
not be waited for and can be recorded.
"""

import triton
import triton.language as tl

from orchestra.worker.attention_triton_kernels import multiply


@triton.jit
def project(
    y,
    x,
    stack,
    order,
    starts,
    tile_ends,
    DIVISOR: tl.constexpr,
    IS_SCATTERED: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Computes a tile of one layer of the experts. The grid is (columns of tiles, as many tiles as there may be).

    Args:
        y: `[pairs, OUTPUTS]`: a pair's row at its place in the sorted order; or, where `IS_SCATTERED`, at its own.
        x: `[_, INPUTS]`: the row of a pair is the one at its own number divided by `DIVISOR`; where that is 0, at its
            place in the sorted order.
        stack: `[EXPERTS, OUTPUTS, INPUTS]`, the weights of the layer.
        order: `int64[pairs]`, the pairs as they are sorted.
        starts: `int64[EXPERTS + 1]`, where each expert's run begins in that order, and where the last one ends.
        tile_ends: `int64[EXPERTS]`, how many tiles there are up to the end of each run.
        DIVISOR: see `x`.
        IS_SCATTERED: see `y`.
        EXPERTS: of this rank.
        EXPERTS_PADDED: the next power of two.
        INPUTS: of the layer.
        OUTPUTS: of the layer.
        ROWS: pairs of a tile.
        COLUMNS: outputs of a tile.
        DEPTH: inputs that are multiplied at a time.
        IS_INTERPRETED: whether Triton's interpreter runs this.
    """
    column, tile = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, EXPERTS_PADDED)
    ends = tl.load(tile_ends + experts, mask=experts < EXPERTS, other=1 << 62)
    expert = tl.sum((ends <= tile).to(tl.int32), 0).to(tl.int64)
    if expert >= EXPERTS:
        return
    tiles_before = tl.max(tl.where(ends <= tile, ends, 0), 0)
    first, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    places = first + (tile - tiles_before) * ROWS + tl.arange(0, ROWS)
    is_pair = places < end
    pairs = tl.load(order + places, mask=is_pair, other=0)
    rows = places if DIVISOR == 0 else pairs // DIVISOR
    outputs = column * COLUMNS + tl.arange(0, COLUMNS)
    is_output = outputs < OUTPUTS
    weights = stack + expert * (OUTPUTS * INPUTS) + outputs[None, :] * INPUTS
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INPUTS, DEPTH):
        inputs = start + tl.arange(0, DEPTH)
        is_input = inputs < INPUTS
        numbers = tl.load(
            x + rows[:, None] * INPUTS + inputs[None, :],
            mask=is_pair[:, None] & is_input[None, :],
            other=0.0,
        )
        factors = tl.load(
            weights + inputs[:, None], mask=is_input[:, None] & is_output[None, :], other=0.0
        )
        sums = multiply(numbers, factors, sums, IS_INTERPRETED)
    targets = pairs if IS_SCATTERED else places
    tl.store(
        y + targets[:, None] * OUTPUTS + outputs[None, :],
        sums.to(y.dtype.element_ty),
        mask=is_pair[:, None] & is_output[None, :],
    )


@triton.jit
def mix(
    y,
    rows,
    weights,
    chosen,
    first,
    count,
    PICKS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up each token's rows in the order of its picks, in fp32. The grid is (tokens, blocks of a row).

    Args:
        y: `[T, SIZE]`
        rows: `[T, PICKS, SIZE]`; not read where the pick is another rank's.
        weights: `float32[T, PICKS]`
        chosen: `int64[T, PICKS]`, the numbers of the experts.
        first: number of this rank's first expert.
        count: how many are this rank's.
        PICKS: experts of a token.
        SIZE: of a row.
        BLOCK: numbers of one program.
    """
    token = tl.program_id(0).to(tl.int64)
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = elements < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for pick in range(PICKS):
        expert = tl.load(chosen + token * PICKS + pick) - first
        if (expert >= 0) & (expert < count):
            place = rows + (token * PICKS + pick) * SIZE + elements
            row = tl.load(place, mask=is_there, other=0.0).to(tl.float32)
            total = tl.fma(row, tl.load(weights + token * PICKS + pick), total)
    tl.store(y + token * SIZE + elements, total.to(y.dtype.element_ty), mask=is_there)

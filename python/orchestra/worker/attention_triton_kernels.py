"""Triton kernels over the paged KV cache: they write a step's keys and values, and attend over the blocks in place.

Attention is an online softmax over tiles of keys (FlashAttention-2, Dao, 2023). The query heads that share a KV head
are rows of one tile, beside the tokens of the step, so that a key is read once for all of them.

What a row gets does not depend on how the work is cut, because every sum has one order, given by positions alone:
tiles of keys begin at multiples of their size; they are added up within *splits*, whose bounds are fixed, and the sums
of the splits are added up in their order. A decode step may give the splits of one sequence to several programs and add
their sums up later (Flash-Decoding), a prefill adds them up as it goes: the operations are the same. Tiles and splits
that a row does not see change nothing of it: its sums are multiplied by 1, and 0 is added.

The first 32 splits hold `SPLIT` tokens each; from there on, each doubling of the context has 16 splits, so that the
number of sums grows with the logarithm of the context.
"""

import triton
import triton.language as tl

SPLITS_PER_DOUBLING = 16
_SPLITS_PER_DOUBLING = tl.constexpr(SPLITS_PER_DOUBLING)
_OCTAVE_FIRST = tl.constexpr(SPLITS_PER_DOUBLING.bit_length() - 1)
# Sums of so many splits are asked for before the first is needed.
_IN_FLIGHT = tl.constexpr(4)


@triton.jit
def write_kv(
    layer,
    key_value,
    slots,
    token_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Writes a token's keys and values to its slot; a slot below 0 belongs to nobody. One program per token.

    Args:
        layer: `[num_blocks, HEADS, BLOCK_SIZE, HEAD_DIM]`, the layer's cache.
        key_value: `[T, HEADS, HEAD_DIM]`, the keys, then the values; tokens lie `token_stride` numbers apart.
        slots: `int32[T]`, `block * BLOCK_SIZE + offset`.
        token_stride: numbers between two tokens.
        HEADS: keys and values of a token.
        HEADS_PADDED: the next power of two.
        HEAD_DIM: size of a head.
        HEAD_DIM_PADDED: the next power of two.
        BLOCK_SIZE: tokens of a block.
    """
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot >= 0:
        heads = tl.arange(0, HEADS_PADDED)[:, None]
        elements = tl.arange(0, HEAD_DIM_PADDED)[None, :]
        is_there = (heads < HEADS) & (elements < HEAD_DIM)
        source = key_value + token.to(tl.int64) * token_stride
        vectors = tl.load(source + heads * HEAD_DIM + elements, mask=is_there)
        runs = (slot // BLOCK_SIZE).to(tl.int64) * HEADS + heads
        target = (runs * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
        tl.store(layer + target + elements, vectors, mask=is_there)


@triton.jit(do_not_specialize=["num_splits"])
def attend(
    output,
    sums,
    stats,
    query,
    layer,
    tile_sequences,
    tile_rows,
    query_start,
    context_lens,
    block_tables,
    table_width,
    query_stride,
    num_splits,
    window,
    scale,
    soft_cap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Attends with one tile of query rows. The grid is (tiles, KV heads, programs that share the splits of a tile).

    Row `r` of a sequence is its token `r // GROUP` of this step, with the head `r % GROUP` of the group.

    Args:
        output: `[T, KV_HEADS * GROUP * HEAD_DIM]`; not written where `IS_SPLIT`.
        sums: `float32[S, KV_HEADS * GROUP, num_splits, HEAD_DIM]`, weighted values of each split; only with `IS_SPLIT`.
        stats: `float32[S, KV_HEADS * GROUP, num_splits, 2]`, the greatest score and the sum of the weights.
        query: `[T, KV_HEADS * GROUP, HEAD_DIM]`; tokens lie `query_stride` numbers apart.
        layer: `[num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM]`, the layer's cache, the new tokens in it.
        tile_sequences: `int32[tiles]`, whose rows they are.
        tile_rows: `int32[tiles]`, the first of them.
        query_start: `int32[S + 1]`, the first token of each sequence.
        context_lens: `int32[S]`, tokens of KV after this step; 0: a row that pads, which gets zeros.
        block_tables: `int32[S, table_width]`.
        table_width: `int32[1]`, in memory, so that a recorded launch reads tables of any width.
        query_stride: numbers between two tokens.
        num_splits: as in the shapes above.
        window: how many tokens a token sees; more than any sequence has where `HAS_WINDOW` is not set.
        scale: multiplies the scores, which then count in powers of two; with `HAS_CAP` what goes into the tanh.
        soft_cap: multiplies the tanh, in the same unit.
        KV_HEADS: of the cache.
        GROUP: query heads of a KV head.
        HEAD_DIM: size of a head.
        HEAD_DIM_PADDED: the next power of two.
        BLOCK_SIZE: tokens of a block.
        ROWS: of a tile.
        KEYS: of a tile.
        SPLIT: tokens of the shortest split, a multiple of `KEYS`.
        IS_SPLIT: whether the sums of the splits are left to `combine`.
        HAS_WINDOW: whether there is a window.
        HAS_CAP: whether scores are bent.
        IS_INTERPRETED: whether Triton's interpreter runs this: it cannot multiply matrices of bf16, and what it gets
            for a row of others depends on where in the matrix the row is.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, first_row = tl.load(tile_sequences + tile), tl.load(tile_rows + tile)
    first_token = tl.load(query_start + sequence)
    num_tokens = tl.load(query_start + sequence + 1) - first_token
    context = tl.load(context_lens + sequence)
    rows = first_row + tl.arange(0, ROWS)
    tokens, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    elements = tl.arange(0, HEAD_DIM_PADDED)
    is_there = (tokens < num_tokens)[:, None] & (elements < HEAD_DIM)[None, :]
    source = query + (first_token + tokens).to(tl.int64)[:, None] * query_stride
    queries = tl.load(source + (heads * HEAD_DIM)[:, None] + elements[None, :], is_there, other=0.0)

    # Positions: of each row, of the first key that a row sees, and behind the last.
    before = context - num_tokens
    positions = before + tokens
    end = before + tl.minimum((first_row + ROWS - 1) // GROUP + 1, num_tokens)
    begin = tl.maximum(before + first_row // GROUP - window + 1, 0)
    tables = block_tables + sequence.to(tl.int64) * tl.load(table_width)
    keys = layer + kv_head * (BLOCK_SIZE * HEAD_DIM)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)
    first_split = _split_of(begin, SPLIT) + tl.program_id(2)
    last_split = _split_of(tl.maximum(end - 1, 0), SPLIT)
    for split in range(first_split, last_split + 1, tl.num_programs(2)):
        part_best = tl.full([ROWS], float("-inf"), tl.float32)
        part_weight = tl.zeros([ROWS], tl.float32)
        part_total = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)
        start = tl.maximum(_split_start(split, SPLIT), begin // KEYS * KEYS)
        for first_key in range(start, tl.minimum(_split_start(split + 1, SPLIT), end), KEYS):
            key_positions = first_key + tl.arange(0, KEYS)
            is_key = key_positions < context
            blocks = tl.load(tables + key_positions // BLOCK_SIZE, mask=is_key, other=0)
            runs = blocks.to(tl.int64) * (2 * KV_HEADS * BLOCK_SIZE) + key_positions % BLOCK_SIZE
            offsets = runs[:, None] * HEAD_DIM + elements[None, :]
            is_number = is_key[:, None] & (elements < HEAD_DIM)[None, :]
            key = tl.load(keys + offsets, mask=is_number, other=0.0)
            value = tl.load(
                keys + KV_HEADS * BLOCK_SIZE * HEAD_DIM + offsets, mask=is_number, other=0.0
            )
            scores = tl.zeros([ROWS, KEYS], tl.float32)
            scores = multiply(queries, tl.trans(key), scores, IS_INTERPRETED) * scale
            if HAS_CAP:
                scores = _tanh(scores) * soft_cap
            is_seen = key_positions[None, :] <= positions[:, None]
            if HAS_WINDOW:
                is_seen = is_seen & (key_positions[None, :] > (positions - window)[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
            new_best = tl.maximum(part_best, tl.max(scores, 1))
            reference = _finite(new_best)
            weights = tl.exp2(scores - reference[:, None])
            shrink = tl.exp2(part_best - reference)
            part_weight = tl.fma(part_weight, shrink, tl.sum(weights, 1))
            part_total = part_total * shrink[:, None]
            part_total = multiply(weights.to(value.dtype), value, part_total, IS_INTERPRETED)
            part_best = new_best
        if IS_SPLIT:
            cell = (sequence * (KV_HEADS * GROUP) + heads) * num_splits + split
            is_row = tokens < num_tokens
            tl.store(stats + cell * 2, part_best, mask=is_row)
            tl.store(stats + cell * 2 + 1, part_weight, mask=is_row)
            target = sums + (cell * HEAD_DIM)[:, None] + elements[None, :]
            tl.store(target, part_total, mask=is_there)
        else:
            best, weight, total = _merge(best, weight, total, part_best, part_weight, part_total)
    if not IS_SPLIT:
        row_stride = KV_HEADS * GROUP * HEAD_DIM
        target = output + (first_token + tokens).to(tl.int64)[:, None] * row_stride
        target += (heads * HEAD_DIM)[:, None] + elements[None, :]
        tl.store(target, _average(total, weight).to(output.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_splits"])
def combine(
    output,
    sums,
    stats,
    context_lens,
    num_splits,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Adds up what `attend` left of the splits of a decoding sequence. The grid is (sequences, KV heads).

    Arguments are those of `attend`; `GROUP_PADDED` is the power of two from `GROUP` on. Sequence `s` is token `s`.
    """
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_lens + sequence)
    members = tl.arange(0, GROUP_PADDED)
    elements = tl.arange(0, HEAD_DIM_PADDED)
    is_element = (elements < HEAD_DIM)[None, :]
    heads = sequence * (KV_HEADS * GROUP) + kv_head * GROUP + members
    best = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_PADDED], tl.float32)
    total = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
    begin = _split_of(tl.maximum(context - window, 0), SPLIT)
    stop = _split_of(tl.maximum(context - 1, 0), SPLIT) + 1
    for first in range(begin, stop, _IN_FLIGHT):
        for offset in tl.static_range(_IN_FLIGHT):
            split = tl.zeros([GROUP_PADDED], tl.int32) + (first + offset)
            is_row = (members < GROUP) & (split < stop)
            cell = heads * num_splits + split
            part_best = tl.load(stats + cell * 2, mask=is_row, other=float("-inf"))
            part_weight = tl.load(stats + cell * 2 + 1, mask=is_row, other=0.0)
            source = sums + (cell * HEAD_DIM)[:, None] + elements[None, :]
            part_total = tl.load(source, mask=is_row[:, None] & is_element, other=0.0)
            best, weight, total = _merge(best, weight, total, part_best, part_weight, part_total)
    is_there = (members < GROUP)[:, None] & is_element
    target = output + (heads.to(tl.int64) * HEAD_DIM)[:, None] + elements[None, :]
    tl.store(target, _average(total, weight).to(output.dtype.element_ty), mask=is_there)


@triton.jit
def _merge(best, weight, total, part_best, part_weight, part_total):
    """Adds the sums of a split to those of the splits before it. Products are fused: no compiler chooses how."""
    new_best = tl.maximum(best, part_best)
    reference = _finite(new_best)
    shrink, part_shrink = tl.exp2(best - reference), tl.exp2(part_best - reference)
    weight = tl.fma(weight, shrink, part_weight * part_shrink)
    total = tl.fma(total, shrink[:, None], part_total * part_shrink[:, None])
    return new_best, weight, total


@triton.jit
def _finite(best):
    """Something that can be subtracted: 0 for a row that has seen nothing yet."""
    return tl.where(best == float("-inf"), 0.0, best)


@triton.jit
def _average(total, weight):
    """The weighted values by the sum of the weights; zeros for a row that sees nothing."""
    return total / tl.where(weight > 0, weight, 1.0)[:, None]


@triton.jit
def multiply(a, b, c, IS_INTERPRETED: tl.constexpr):
    """`a @ b + c`, added up in fp32."""
    if IS_INTERPRETED:
        return c + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _tanh(x):
    """The hyperbolic tangent, from one exponential that cannot overflow."""
    shrunk = tl.exp2(tl.abs(x) * -2.8853900817779268)  # e^(-2|x|)
    y = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -y, y)


@triton.jit
def _split_of(position, SPLIT: tl.constexpr):
    """The split that a position is in."""
    block = position // SPLIT
    # The exponent of a float is the logarithm, rounded down.
    exponent = (block.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    octave = tl.maximum(exponent - _OCTAVE_FIRST, 0)
    return octave * _SPLITS_PER_DOUBLING + (block >> octave)


@triton.jit
def _split_start(split, SPLIT: tl.constexpr):
    """The first position of a split."""
    octave = tl.maximum(split // _SPLITS_PER_DOUBLING - 1, 0)
    return ((split - octave * _SPLITS_PER_DOUBLING) << octave) * SPLIT


def split_of(position: int, shortest: int) -> int:
    """The split that a position is in, as the kernels count with `SPLIT = shortest`."""
    block = position // shortest
    octave = max(0, block.bit_length() - SPLITS_PER_DOUBLING.bit_length())
    return octave * SPLITS_PER_DOUBLING + (block >> octave)

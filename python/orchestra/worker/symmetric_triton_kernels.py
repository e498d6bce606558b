"""The Triton kernel that adds up numbers of several GPUs, each of which sees the memory of all.

One launch does all of it, however long the message is. A program has a slot of its own in every rank's memory, and
deals with the programs of its number on the other ranks and with no others: it puts its piece of this rank's numbers
into its slot, tells them, waits until they have told it, and reads their slots. Slots are there twice and take turns.
Who writes to one has been told by all others that they have their next piece in the other slot, and so are through with
what they read in this one: a wait for each piece is enough, also where the next piece is of the next message.

The numbers are added in fp32, in the order of the ranks, whatever the message's length: as `topology.add_up` does.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def all_reduce(
    numbers,
    bases,
    epochs,
    stop,
    count,
    piece,
    share,
    timeout_ns,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    SIGNAL_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOKS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Replaces numbers by their sums over all ranks. The grid is at most (PROGRAMS,), the same on every rank.

    Every program has to run at the same time as those of its number on the other ranks.

    Args:
        numbers: `[count]` without gaps.
        bases: `int64[SIZE]`, where the memory of each rank lies: `int32[PROGRAMS, SIZE]` signals, by who gives them, in
            `SIGNAL_BYTES`; then `[2, PROGRAMS, SLOT_BYTES]` slots.
        epochs: `int32[PROGRAMS]`, two for each piece that a program has been through; it may wrap around.
        stop: `int32[1]` in memory of the host; where it is not 0, nothing is waited for any more.
        count: of the numbers.
        piece: numbers of a program at a time; they fit a slot.
        share: of a piece, which a rank adds up for all where `IS_SHARED`.
        timeout_ns: of each wait; what was waited for in vain ends everything on this GPU.
        RANK: this one.
        SIZE: number of ranks.
        LANES: the power of two that is not less.
        PROGRAMS: most programs.
        SLOT_BYTES: of a slot.
        SIGNAL_BYTES: what signals take.
        BLOCK: numbers that a program handles at once.
        LOOKS: how often a program looks at its signals before it looks at what takes longer: `stop`, and the clock.
        IS_SHARED: whether each rank adds up a share for all, and all then read the sums: fewer bytes, one more wait.
            Else each adds up everything.
        IS_INTERPRETED: whether Triton's interpreter runs this: it has no clock.
    """
    program = tl.program_id(0)
    epoch = tl.load(epochs + program)
    elements = tl.arange(0, BLOCK)
    for first in range(program * piece, count, tl.num_programs(0) * piece):
        length = tl.minimum(piece, count - first)
        turn = (epoch >> 1) & 1
        slot = SIGNAL_BYTES + (turn * PROGRAMS + program).to(tl.int64) * SLOT_BYTES
        own = _slot(bases, RANK, slot, numbers)
        mine = numbers + first
        for start in range(0, length, BLOCK):
            place = start + elements
            is_there = place < length
            tl.store(own + place, tl.load(mine + place, mask=is_there), mask=is_there)
        if IS_SHARED:
            _meet(bases, stop, epoch + 1, 1, timeout_ns, RANK, SIZE, LANES, LOOKS, IS_INTERPRETED)
            # Nobody else reads this share of this slot before the next signal.
            end = tl.minimum((RANK + 1) * share, length)
            for start in range(RANK * share, end, BLOCK):
                place = start + elements
                is_there = place < end
                total = _add_up(bases, slot, numbers, place, is_there, SIZE)
                tl.store(own + place, total, mask=is_there)
            _meet(bases, stop, epoch + 2, 1, timeout_ns, RANK, SIZE, LANES, LOOKS, IS_INTERPRETED)
            for rank in tl.static_range(SIZE):
                theirs = _slot(bases, rank, slot, numbers)
                end = tl.minimum((rank + 1) * share, length)
                for start in range(rank * share, end, BLOCK):
                    place = start + elements
                    is_there = place < end
                    total = tl.load(theirs + place, mask=is_there)
                    tl.store(mine + place, total, mask=is_there)
        else:
            _meet(bases, stop, epoch + 2, 2, timeout_ns, RANK, SIZE, LANES, LOOKS, IS_INTERPRETED)
            for start in range(0, length, BLOCK):
                place = start + elements
                is_there = place < length
                total = _add_up(bases, slot, numbers, place, is_there, SIZE)
                tl.store(mine + place, total, mask=is_there)
        epoch += 2
    tl.store(epochs + program, epoch)


@triton.jit
def _slot(bases, rank, slot, numbers):
    """Where a slot of a rank lies, as a pointer to numbers."""
    place = (tl.load(bases + rank) + slot).to(tl.pointer_type(numbers.dtype.element_ty))
    return tl.multiple_of(place, 16)


@triton.jit
def _add_up(bases, slot, numbers, place, is_there, SIZE: tl.constexpr):
    """The sum of what lies in a place of the ranks' slots: in fp32, in their order, rounded once."""
    total = tl.load(_slot(bases, 0, slot, numbers) + place, mask=is_there).to(tl.float32)
    for rank in tl.static_range(1, SIZE):
        total += tl.load(_slot(bases, rank, slot, numbers) + place, mask=is_there).to(tl.float32)
    return total.to(numbers.dtype.element_ty)


@triton.jit
def _meet(
    bases,
    stop,
    epoch,
    advance,
    timeout_ns,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    LOOKS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Waits for this program's like on the other ranks: what they have written before can be read after.

    Args:
        bases: as for `all_reduce`.
        stop: as well.
        epoch: that they are to reach.
        advance: by how much this rank comes nearer to it.
        timeout_ns: as for `all_reduce`.
        RANK: this one.
        SIZE: number of ranks.
        LANES: the power of two that is not less.
        LOOKS: as for `all_reduce`.
        IS_INTERPRETED: as for `all_reduce`.
    """
    program = tl.program_id(0)
    ranks = tl.arange(0, LANES)
    is_other = (ranks < SIZE) & (ranks != RANK)
    others = tl.load(bases + ranks, mask=is_other, other=0) + 4 * (program * SIZE + RANK)
    heard = tl.load(bases + RANK) + 4 * (program * SIZE + ranks)
    # What every thread of the program has read and written comes before the signal.
    tl.debug_barrier()
    signals = others.to(tl.pointer_type(tl.int32))
    tl.atomic_add(signals, advance, mask=is_other, sem="release", scope="sys")
    signals = heard.to(tl.pointer_type(tl.int32))
    looks, behind = 0, 1
    began = 0 if IS_INTERPRETED else globaltimer()
    while behind > 0:
        seen = tl.atomic_add(signals, 0, mask=is_other, sem="acquire", scope="sys")
        # By difference, so that epochs may wrap around.
        behind = tl.max(tl.where(is_other, epoch - seen, 0), 0)
        looks += 1
        if looks % LOOKS == 0:
            now = began if IS_INTERPRETED else globaltimer()
            if tl.load(stop, volatile=True) != 0:
                behind = 0
            elif now - began > timeout_ns:
                # The sums would be none, and nothing else keeps the host from taking them for some.
                tl.inline_asm_elementwise(
                    "trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
                )
    tl.debug_barrier()

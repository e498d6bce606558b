"""The kernels of `_core`. For type checkers alone: there is no such module at run time.

Tensors are handed over as addresses. Who calls promises that so many numbers lie there, without gaps, on the CPU, and
that nobody writes them (or reads what the call writes) before it returns. No call holds the interpreter lock.
"""

from collections.abc import Sequence
from typing import final

@final
class KernelProgram:
    """Calls of kernels, noted by `begin_recording`, in their order.

    It knows the tensors' addresses only: whoever runs it has to keep them.
    """

    def run(self, rows: int) -> None:
        """Makes the calls for the first `rows` rows of their tensors, at most as many as they were noted for.

        Raises:
            InvalidRequestError: There are more rows.
            InternalError: A sum over ranks has ended as `SharedGroup.all_reduce` says; what follows was not called.
        """

    def __len__(self) -> int:
        """Calls."""

def begin_recording(rows: int) -> None:
    """From now on this thread notes calls of kernels instead of making them.

    These are `look_up`, `rms_norm`, `gate`, `add`, `rotate`, `SharedGroup.all_reduce`, and `forward` of `Linear`,
    `ExpertRouter`, `Experts` and `PagedAttention`. Each is of `rows` rows (a sum of as many numbers in each), or raises
    `InvalidRequestError`; attention is of those of the step that is prepared when the call is made.

    Raises:
        InvalidRequestError: The thread does so already.
    """

def end_recording() -> KernelProgram:
    """Ends that; returns what was noted."""

@final
class PagedAttention:
    """Attention over the paged KV cache of one rank, on torch's own OpenMP threads where there are some.

    Args:
        shape: Query heads, KV heads, size of a head, tokens per block (both multiples of 8), blocks.
        dtype: `float32` or `bfloat16`.
        layers: Of each layer the address of its `[blocks, 2, kv_heads, block_size, head_dim]`, the tokens that each one
            sees, the scale of the scores and their soft cap; `None` is all before it, the usual scale, no cap.
        portable: Whether to leave away what only some processors can.

    Raises:
        InvalidRequestError: A number is out of range; `key` names it.
    """

    def __new__(
        cls,
        shape: tuple[int, int, int, int, int],
        dtype: str,
        layers: Sequence[tuple[int, int | None, float | None, float | None]],
        *,
        portable: bool = False,
    ) -> PagedAttention: ...
    def prepare(
        self,
        slot_mapping: bytes,
        query_start: bytes,
        context_lens: bytes,
        block_tables: bytes,
        threads: int,
    ) -> None:
        """Lays out the next step, whose `int32` arrays are as `orchestra.worker.plan.StepPlan` has them.

        Args:
            slot_mapping: `[T]`
            query_start: `[S + 1]`
            context_lens: `[S]`
            block_tables: `[S, W]`
            threads: On how many to compute.

        Raises:
            InvalidRequestError: They do not fit each other or the cache; the step before stays.
        """

    def forward(
        self,
        layer: int,
        query_ptr: int,
        query_stride: int,
        key_value_ptr: int,
        key_value_stride: int,
        output_ptr: int,
    ) -> None:
        """Writes the prepared step's new KV of a layer to the cache, then attends over it.

        Args:
            layer: In the order of `layers`.
            query_ptr: Address of `[T, num_heads, head_dim]`.
            query_stride: Numbers from one token's queries to the next one's.
            key_value_ptr: Address of `[T, 2 * num_kv_heads, head_dim]`, the keys, then the values.
            key_value_stride: Numbers from one token's keys to the next one's.
            output_ptr: Where `[T, num_heads * head_dim]` goes.

        Raises:
            InvalidRequestError: There is no such layer.
        """

@final
class SharedGroup:
    """One rank's end of the collectives between the ranks of one machine, over shared memory.

    One thread at a time is in a collective; a second one waits for it. `abort` may come from any thread at any time.

    Args:
        rank: Of this end.
        size: Ranks of the group, at most 64.
        generation: Which group of these ranks it is.
        timeout_ms: How long a rank waits for another inside a collective.
        address: Where rank 0's memory is; `None` makes it, on rank 0.

    Raises:
        ConfigError: A number is out of range; `key` names it.
        InternalError: Memory cannot be had, or what is at the address is not this group's.
    """

    def __new__(
        cls, rank: int, size: int, generation: int, timeout_ms: int, address: str | None = None
    ) -> SharedGroup: ...
    @property
    def address(self) -> str:
        """Where the other ranks find the memory, until rank 0 has met them all."""

    def meet(self) -> None:
        """Waits until every rank is there.

        Raises:
            InternalError: A rank did not come in time, or the group was aborted.
        """

    def all_reduce(self, data_ptr: int, numel: int, dtype: str) -> None:
        """Replaces `numel` numbers by their sums over all ranks, added in fp32 in the order of the ranks.

        Args:
            data_ptr: Address of the first number.
            numel: How many, the same on every rank.
            dtype: `float32` or `bfloat16`.

        Raises:
            InvalidRequestError: The dtype is another.
            InternalError: A rank is gone, late or in another collective, or the group was aborted.
        """

    def gather_columns(
        self, data_ptr: int, num_bytes: int, rows: int, joined_ptr: int | None = None
    ) -> None:
        """Joins the ranks' `[rows, columns]` side by side.

        Args:
            data_ptr: Address of this rank's part.
            num_bytes: Of it, the same on every rank.
            rows: Of it.
            joined_ptr: Where rank 0 wants the result; `None` on the others.

        Raises:
            InvalidRequestError: The rows do not divide the bytes, or a rank but rank 0 wants the result.
            InternalError: A rank is gone, late or in another collective, or the group was aborted.
        """

    def reduce_scatter(self, data_ptr: int, numel: int, dtype: str, share_ptr: int) -> None:
        """Adds up `numel` numbers over all ranks as `all_reduce` does; rank `r` gets the `r`-th of `size` equal shares.

        Args:
            data_ptr: Address of the first number.
            numel: How many, the same on every rank.
            dtype: `float32` or `bfloat16`.
            share_ptr: Where the share goes, `numel / size` numbers.

        Raises:
            InvalidRequestError: The dtype is another, or the ranks do not divide the numbers.
            InternalError: A rank is gone, late or in another collective, or the group was aborted.
        """

    def all_gather(self, data_ptr: int, num_bytes: int, joined_ptr: int) -> None:
        """Puts the parts of all ranks one behind the other, on every rank.

        Args:
            data_ptr: Address of this rank's part.
            num_bytes: Of it, the same on every rank.
            joined_ptr: Where `size * num_bytes` bytes go.

        Raises:
            InternalError: A rank is gone, late or in another collective, or the group was aborted.
        """

    def begin_step(self) -> None:
        """Says that a step begins, of which `progress` gives the longest time."""

    def progress(self) -> tuple[int, bool, float]:
        """Collectives entered, whether it is in one now, and the longest time of the step between two of them, seconds.

        Any thread may ask at any time.
        """

    def abort(self) -> None:
        """Ends the collectives of every rank, now and from now on."""

def rms_norm(
    dtype: str,
    shape: tuple[int, int, int],
    input: tuple[int, int],
    addend_ptr: int | None,
    weight: tuple[int, float],
    output: tuple[int, int],
    threads: int,
) -> None:
    """`x / sqrt(mean(x²) + epsilon) * weight` of each row, computed in `float32`.

    Args:
        dtype: `float32` or `bfloat16`, of input, addend and output.
        shape: Tokens, rows of a token, numbers of a row.
        input: Address of the first token's rows, which have no gaps, and numbers from one token's to the next one's.
        addend_ptr: Address of as many numbers without gaps; the input becomes the rounded sum first.
        weight: Address of `float32[rows of a token, numbers of a row]`, and epsilon.
        output: As `input`, and may be it.
        threads: On how many to compute.

    Raises:
        InvalidRequestError: The dtype is another.
    """

def gate(
    dtype: str,
    shape: tuple[int, int],
    activation: str,
    input_ptr: int,
    output_ptr: int,
    threads: int,
) -> None:
    """Multiplies the second half of each row by its bent first half, computed in `float32`.

    Args:
        dtype: `float32` or `bfloat16`.
        shape: Rows, and numbers of each half.
        activation: `silu` or `gelu_pytorch_tanh`.
        input_ptr: Address of the rows, without gaps.
        output_ptr: Where `shape` goes.
        threads: On how many to compute.

    Raises:
        InvalidRequestError: The dtype or the activation is another.
    """

def add(
    dtype: str,
    shape: tuple[int, int],
    target_ptr: int,
    addend_ptr: int,
    threads: int,
) -> None:
    """Adds rows to rows, computed in `float32`.

    Args:
        dtype: `float32` or `bfloat16`.
        shape: Rows, numbers of a row.
        target_ptr: Address of the rows, without gaps; they become the sums.
        addend_ptr: Address of as many others, without gaps.
        threads: On how many to compute.

    Raises:
        InvalidRequestError: The dtype is another.
    """

def rotate(
    dtype: str,
    shape: tuple[int, int, int],
    heads: tuple[int, int],
    angles_ptr: int,
    threads: int,
) -> None:
    """Multiplies pairs of neighbours, as complex numbers, in place, computed in `float32`.

    Args:
        dtype: `float32` or `bfloat16`.
        shape: Tokens, heads of a token, numbers of a head.
        heads: Address of the first token's heads, which have no gaps, and numbers from one token's to the next one's.
        angles_ptr: Address of `complex64[tokens, numbers of a head / 2]`, without gaps.
        threads: On how many to compute.

    Raises:
        InvalidRequestError: The dtype is another.
    """

def look_up(
    dtype: str,
    table: tuple[int, int, int],
    places: tuple[int, int],
    first: int,
    scale: float | None,
    output_ptr: int,
    threads: int,
) -> None:
    """Copies rows out of a table.

    Args:
        dtype: `float32` or `bfloat16`.
        table: Address of the table, without gaps, its rows, and numbers of a row.
        places: Address of `int64[rows]`, and their number: which rows; those outside the table give zeros.
        first: The place of the table's first row.
        scale: Multiplies the numbers, in `float32`; `None`: they are copied as they are.
        output_ptr: Where the rows go, without gaps.
        threads: On how many to compute.

    Raises:
        InvalidRequestError: The dtype is another.
    """

def mix(
    dtype: str,
    shape: tuple[int, int, int],
    rows_ptr: int,
    weights_ptr: int,
    output_ptr: int,
    threads: int,
) -> None:
    """Adds up each token's rows in their order, in `float32`, as `Experts` does.

    Args:
        dtype: `float32` or `bfloat16`.
        shape: Tokens, rows of each, numbers of a row.
        rows_ptr: Address of `[tokens, rows, numbers]`, without gaps.
        weights_ptr: Address of `float32[tokens, rows]`: what multiplies each.
        output_ptr: Where the sums go, `[tokens, numbers]`, without gaps.
        threads: On how many to compute.

    Raises:
        InvalidRequestError: The dtype is another.
    """

def bind_threads(cores: list[int], threads: int) -> None:
    """Keeps the threads that compute on some cores: this one, and those of torch's that kernels are given.

    Args:
        cores: By their numbers.
        threads: How many compute.

    Raises:
        InternalError: The system does not let them.
    """

def candidates(
    dtype: str,
    shape: tuple[int, int],
    logits: tuple[int, int],
    first: int,
    candidates_ptr: int,
    threads: int,
) -> None:
    """Finds the largest number of each row, the first of equals, for `likeliest_of`. What is no number does not count.

    Args:
        dtype: `float32` or `bfloat16`.
        shape: Rows, numbers of a row.
        logits: Address of the first row, and numbers from one row to the next one.
        first: The token of the first column.
        candidates_ptr: Where `int64[rows]` goes: the place of the number among all numbers, in the high half, and
            `0xFFFFFFFF` less its token. The largest of several is of the largest number, and the first of equals.
        threads: On how many to compute.

    Raises:
        InvalidRequestError: The dtype is another.
    """

def likeliest_of(shape: tuple[int, int], candidates_ptr: int, tokens_ptr: int) -> None:
    """Finds the tokens of the best of some `candidates`.

    Args:
        shape: Rows, candidates of a row: at least one.
        candidates_ptr: `int64[rows, each]`
        tokens_ptr: Where `int64[rows]` goes.
    """

def softmax(
    dtype: str,
    shape: tuple[int, int],
    logits: tuple[int, int],
    temperatures_ptr: int,
    probabilities_ptr: int,
    threads: int,
) -> None:
    """Divides rows of logits by their temperatures and makes probabilities of them.

    Args:
        dtype: `float32` or `bfloat16`, of the logits.
        shape: Rows, numbers of a row.
        logits: Address of the first row, and numbers from one row to the next one.
        temperatures_ptr: Address of `float32[rows]`, above 0.
        probabilities_ptr: Where `float32[rows, numbers]` goes.
        threads: On how many to compute.

    Raises:
        InvalidRequestError: The dtype is another.
    """

def draw(
    shape: tuple[int, int],
    probabilities_ptr: int,
    numbers_ptr: int,
    tokens_ptr: int,
    threads: int,
) -> None:
    """Inverts the distribution function of each row, in the order of the numbers.

    Args:
        shape: Rows, numbers of a row.
        probabilities_ptr: Address of `float32[rows, numbers]`, without gaps, not necessarily of sum 1.
        numbers_ptr: Address of `float64[rows]`, in [0, 1).
        tokens_ptr: Where `int64[rows]` goes: never one of probability 0, unless all are or are no numbers.
        threads: On how many to compute.
    """

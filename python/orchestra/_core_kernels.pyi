"""The kernels of `_core`. For type checkers alone: there is no such module at run time.

Tensors are handed over as addresses. Who calls promises that so many numbers lie there, without gaps, on the CPU, and
that nobody writes them (or reads what the call writes) before it returns. No call holds the interpreter lock.
"""

from typing import final

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

    def abort(self) -> None:
        """Ends the collectives of every rank, now and from now on."""

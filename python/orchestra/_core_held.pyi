"""What a scheduler of `_core` gives out. For type checkers alone: there is no such module when the program runs."""

from types import TracebackType
from typing import final

@final
class KvFetch:
    """KV blocks that a worker should read from another one, which holds them."""

    @property
    def source(self) -> str:
        """Who holds them."""

    @property
    def num_blocks(self) -> int:
        """Leading blocks of the prompt that the source holds, those that the worker has itself included."""

    @property
    def saved_tokens(self) -> int:
        """How much less that costs than computing, in tokens of prefill."""

@final
class KvSplit:
    """KV blocks that another worker, the helper, should compute for a worker and write to it."""

    @property
    def helper(self) -> str:
        """Who computes."""

    @property
    def num_blocks(self) -> int:
        """Leading blocks of the prompt that are computed there."""

@final
class Reservation:
    """Room on a worker, held until it is released or the last reference to it goes.

    As a context manager it is released at the end of the block.
    """

    @property
    def worker(self) -> str:
        """The chosen worker."""

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV the worker held already."""

    @property
    def num_blocks(self) -> int:
        """KV blocks of prompt and output together, cached ones included."""

    @property
    def fetch(self) -> KvFetch | None:
        """What the worker should read from another one instead of computing it."""

    @property
    def split(self) -> KvSplit | None:
        """Who should compute the prompt for the worker; never together with `fetch`.

        Room is held there too, until `split_done`, or until this reservation is given back.
        """

    @property
    def move_wait_s(self) -> float:
        """How long the worker should wait for either before it computes for itself, seconds; 0 where nothing comes."""

    def fetch_done(self, num_tokens: int) -> bool:
        """Tells of how many prompt tokens the fetch has brought the KV; 0: it failed.

        To be called before `prefill_done`. How long that took teaches the scheduler what fetching costs.

        Returns:
            `False` where nothing was to be fetched, or the reservation is gone.
        """

    def split_done(self) -> bool:
        """Tells that the helper has computed its part, and gives its room back.

        Returns:
            `False` where there is no helper, or its room is gone already.
        """

    def prefill_done(self) -> bool:
        """Tells that the prompt is computed: its tokens no longer queue on the worker.

        How long that took teaches the scheduler how fast the worker is, which predictions need.

        Returns:
            `False` where that was told before, or the reservation is gone.
        """

    def finish(self, num_output_tokens: int) -> bool:
        """Gives the room back, and charges the tenant for the output that came instead of for `max_tokens`.

        Returns:
            `False` where it is gone already: released before, or its worker was removed.
        """

    def release(self) -> bool:
        """Gives the room back.

        Returns:
            `False` where it is gone already: released before, or its worker was removed.
        """

    def __enter__(self) -> Reservation: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class Placement:
    """Memory on a gang of GPUs, held until it is released or the last reference to it goes.

    As a context manager it is released at the end of the block.
    """

    @property
    def id(self) -> int:
        """Names it in the `preempted` of those that displaced it."""

    @property
    def gpus(self) -> tuple[tuple[str, int, int], ...]:
        """`(name, offset_bytes, length_bytes)` of each GPU, by stage and then in order of registration.

        All of a stage are of one domain. A GPU with paged memory is named once for each piece.
        """

    @property
    def stages(self) -> tuple[int, ...]:
        """The stage of each of `gpus`."""

    @property
    def preempted(self) -> tuple[int, ...]:
        """The placements of lower priority whose memory it took; their `release()` answers `False`."""

    def release(self) -> bool:
        """Gives the memory back.

        Returns:
            `False` where it is gone already: released before, or one of its GPUs was removed.
        """

    def __enter__(self) -> Placement: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class Ticket:
    """A place in the queue of those that wait for room."""

    def cancel(self) -> bool:
        """Ends the wait: the callback will not be called.

        Returns:
            `False` where it was called or is about to be.
        """

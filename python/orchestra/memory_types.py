"""What goes into a buffer manager and what it tells."""

from dataclasses import dataclass
from typing import Literal, TypedDict

__all__ = ["MemoryEvent", "MemoryStats", "TransferOptions", "TransferStats"]


class TransferOptions(TypedDict, total=False):
    """How a transfer is made.

    Attributes:
        notify: Sent to the owner after the bytes, as `MemoryEvent.payload`; at most 1 KiB unless set otherwise.
        timeout: Seconds after which it is given up; 5 unless given.
        start: The first of the local blocks; 0 unless given.
        count: How many of them; all from `start` on unless given.
        first: The first block of the grant; 0 unless given.
        part: The bytes of each block that are moved, from and to; all of them unless given.
        ends_grant: Whether this is the last use of the grant, so that its owner has the blocks to itself again; so it
            is unless given.
    """

    notify: bytes
    timeout: float
    start: int
    count: int | None
    first: int
    part: tuple[int, int] | None
    ends_grant: bool


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What a transfer did.

    Attributes:
        blocks: Blocks, or parts of blocks.
        bytes: Bytes of them.
        descriptors: Runs of neighbours that they were joined into.
        seconds: From the call to the end.
    """

    blocks: int
    bytes: int
    descriptors: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """Something that a peer did, or did not do, to memory of this process.

    Attributes:
        kind: `arrived`: a transfer of the peer's is over and was allowed. `stale`: it is over, but its grant had ended
            or its blocks were freed, so nothing arrived. `malformed`: the peer said what no manager says.
            `grant_expired`: a write grant ended before the peer was done, so its blocks are in quarantine.
        peer: Who; `None` where it has gone since, and for `grant_expired`.
        grant: The `Grant.id`.
        rights: What it allowed: `write` where blocks hold the peer's bytes now, `read` where it has read them.
        num_blocks: How many blocks.
        ends_grant: Whether the grant is over, so that blocks that were filled can be sealed.
        payload: What the peer gave as `notify`.
    """

    kind: Literal["arrived", "stale", "malformed", "grant_expired"]
    peer: str | None
    grant: int | None
    rights: Literal["read", "write"] | None
    num_blocks: int
    ends_grant: bool
    payload: bytes


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Counts of a manager at one moment.

    Attributes:
        active_transfers: Transfers that have not ended.
        unproven_transfers: Transfers that were given up and that nobody has proven to be over.
        inflight_bytes: Bytes under way.
        open_grants: Grants that peers may use, or may still be using.
        quarantined_blocks: Blocks that wait for proof. An operator should look where this stays.
        is_quarantine_full: Whether so many wait that grants and transfers are refused.
        unproven_peers: Peers whose connection ended without proof that they are quiet.
        registrations: Memory of others that is registered, by `BufferManager.register`.
        registrations_held: Those of them that somebody holds, a transfer included.
        registered_bytes: Bytes of all of them.
        registration_hits: Requests that found their memory registered.
        registration_misses: Requests that had it registered.
        registration_evictions: Registrations that were given up to make room.
    """

    active_transfers: int
    unproven_transfers: int
    inflight_bytes: int
    open_grants: int
    quarantined_blocks: int
    is_quarantine_full: bool
    unproven_peers: int
    registrations: int
    registrations_held: int
    registered_bytes: int
    registration_hits: int
    registration_misses: int
    registration_evictions: int

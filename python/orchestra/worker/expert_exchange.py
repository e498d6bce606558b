"""Experts that the ranks of a worker have between them, while each computes tokens of its own.

Where ranks divide the tokens of a step (`--cp`), each sends the rows of its tokens to the ranks that have their
experts, and gets back what those make of them (the all-to-all of GShard, Lepikhin et al., 2020, section 3.2, without
its limit of tokens for an expert: none is ever dropped). Where all compute the same tokens, each computes the rows of
its experts, and all gather them. Either way the rank that has a token adds up its rows in the order of its picks, so
that its numbers are, to the bit, those of a rank that has all experts.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from orchestra.worker.sharding import Shard

if TYPE_CHECKING:
    from orchestra.worker.experts import Experts

# The weighted sum of each token's rows, in their order: `[T, picks, H]` and `float32[T, picks]` to `[T, H]`.
Mix = Callable[[Tensor, Tensor], Tensor]


class GatheringGroup(Protocol):
    """Ranks that can gather."""

    def all_gather(self, part: Tensor) -> Tensor:
        """Every rank's `[n, ...]` in the order of the ranks, `[size, n, ...]`."""
        ...


@runtime_checkable
class ExchangingGroup(Protocol):
    """Ranks that can send rows to each other without showing them to all."""

    def exchange_rows(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends the first `sent[0]` of `rows` to rank 0 and so on; returns `received[0]` from rank 0 and so on."""
        ...


class ExpertGroup:
    """The ranks that have the experts between them.

    Args:
        group: their collectives, which raise `RuntimeError` where a rank is lost.
        shard: this rank's place.
    """

    def __init__(self, group: GatheringGroup, shard: Shard) -> None:
        self.shard = shard
        self.is_divided = False
        """Whether each computes other tokens of the step; else all compute the same."""
        self._group = group

    def share(self, counts: list[int], device: torch.device) -> list[list[int]]:
        """Every rank's numbers, in the order of the ranks."""
        everyone: list[list[int]] = self._group.all_gather(
            torch.tensor(counts, device=device)
        ).tolist()
        return everyone

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Every rank's rows behind each other, of which there are so many."""
        everyone = self._gather_padded(rows, max(counts))
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    def exchange(self, rows: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
        """Sends rows where they are wanted.

        Args:
            rows: this rank's, sorted by the rank that they are for.
            counts: `counts[a][b]` go from rank `a` to rank `b`; the same on every rank.

        Returns:
            What is for this rank, sorted by the rank that it is from.
        """
        rank = self.shard.rank
        received = [sent[rank] for sent in counts]
        if isinstance(self._group, ExchangingGroup):
            return self._group.exchange_rows(rows, list(counts[rank]), received)
        # Over shared memory all see everything anyway.
        everyone = self._gather_padded(rows, max(map(sum, counts)))
        starts = [sum(sent[:rank]) for sent in counts]
        parts = zip(everyone, starts, received, strict=True)
        return torch.cat([part[start : start + count] for part, start, count in parts])

    def _gather_padded(self, rows: Tensor, longest: int) -> Tensor:
        padding = rows.new_zeros(longest - len(rows), *rows.shape[1:])
        return self._group.all_gather(torch.cat([rows, padding]))


class ExchangedExperts:
    """See `experts.Experts`: those of all ranks of a group.

    Args:
        own: this rank's.
        mix: adds up as those do.
        bounds: number of each rank's first expert, and the number behind that of the last one's last.
        group: the ranks.
        device: where they compute.
    """

    def __init__(
        self,
        own: "Experts",
        mix: Mix,
        bounds: Sequence[int],
        group: ExpertGroup,
        device: torch.device,
    ) -> None:
        self._own = own
        self._mix = mix
        self._bounds = torch.tensor(bounds, device=device)
        self._group = group

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """See `experts.Experts`; picks of experts that no rank of the group has count for nothing."""
        tokens, picks = chosen.shape
        experts = chosen.flatten()
        # Of each pair of token and pick the rank; -1 and `size` are no rank's of this group.
        ranks = torch.bucketize(experts.long(), self._bounds, right=True) - 1
        size = self._group.shard.size
        before, *counts, _ = torch.bincount(ranks + 1, minlength=size + 2).tolist()
        # Sorted by rank, and those of a rank as they come.
        pairs = ranks.argsort(stable=True)[before : before + sum(counts)]
        if not self._group.is_divided:
            start = sum(counts[: self._group.shard.rank])
            own = pairs[start : start + counts[self._group.shard.rank]]
            computed = self._compute(x.index_select(0, own // picks), experts[own])
            computed = self._group.gather(computed, counts)
        else:
            computed = self._compute_elsewhere(
                x.index_select(0, pairs // picks), experts[pairs], counts
            )
        rows = x.new_zeros(tokens * picks, x.shape[1]).index_copy_(0, pairs, computed)
        return self._mix(rows.view(tokens, picks, x.shape[1]), weights)

    def _compute_elsewhere(self, x: Tensor, experts: Tensor, counts: list[int]) -> Tensor:
        """What each row's expert makes of it, wherever that is; so many rows are for each rank, in their order."""
        sent = self._group.share(counts, x.device)
        x, experts = self._group.exchange(x, sent), self._group.exchange(experts, sent)
        back = [list(received) for received in zip(*sent, strict=True)]
        return self._group.exchange(self._compute(x, experts), back)

    def _compute(self, x: Tensor, experts: Tensor) -> Tensor:
        """What each row's expert, which is this rank's, makes of it."""
        if len(x) == 0:
            return x
        alone = torch.ones(len(x), 1, device=x.device)
        return self._own(x, alone, experts.unsqueeze(1))

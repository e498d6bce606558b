"""Which part of the model a rank holds: its layers, and its slices of them. Arithmetic only, the same on every rank."""

import math
from dataclasses import dataclass

from orchestra.errors import ConfigError


@dataclass(frozen=True)
class Span:
    """Half-open range `[start, stop)` of rows or columns."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def after(self, offset: int) -> "Span":
        """The same range `offset` further on."""
        return Span(self.start + offset, self.stop + offset)


@dataclass(frozen=True)
class HeadShard:
    """The attention heads of one rank.

    Query head `i` of the rank reads KV head `i // (num_heads // len(kv_heads))` of the rank.
    """

    heads: Span
    """Query heads, by their number in the model."""
    kv_heads: tuple[int, ...]
    """KV heads by their number in the model; one number may stand more than once."""

    def query_rows(self, head_dim: int) -> Span:
        """The rows of the query heads in their projection, which are their columns in the output projection."""
        return Span(self.heads.start * head_dim, self.heads.stop * head_dim)

    def kv_rows(self, head_dim: int) -> list[Span]:
        """The rows of each KV head in the key or value projection."""
        return [Span(head * head_dim, (head + 1) * head_dim) for head in self.kv_heads]


@dataclass(frozen=True)
class Shard:
    """One rank's place in a group: of the ranks that share each layer, where nothing else is said."""

    rank: int = 0
    size: int = 1

    def span(self, total: int) -> Span:
        """This rank's share of `total` rows; the shares differ by at most one row."""
        return Span(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def bounds(self, total: int) -> list[int]:
        """Where the ranks' shares of `total` rows begin, and the last one ends."""
        return [Shard(rank, self.size).span(total).start for rank in range(self.size)] + [total]

    def padded_rows(self, total: int) -> int:
        """Rows of every rank where all must have equally many; the last ranks then hold padding."""
        return -(-total // self.size)

    def padded_span(self, total: int) -> Span:
        """This rank's real rows among its `padded_rows(total)`; may be empty."""
        rows = self.padded_rows(total)
        return Span(min(self.rank * rows, total), min((self.rank + 1) * rows, total))

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadShard:
        """Divides the heads; a KV head goes to every rank with a query head that reads it.

        Raises:
            ConfigError: the number of ranks does not divide the number of heads.
        """
        if num_heads % self.size:
            raise ConfigError(f"tp: {self.size} ranks do not divide {num_heads} attention heads")
        heads = self.span(num_heads)
        readers = num_heads // num_kv_heads
        # The longest run of heads that never straddles two KV heads, wherever the rank's share begins:
        #   12 heads, 4 KV heads, 3 ranks:  rank 1 holds 4..8 = | 4 5 | 6 7 | -> runs of one head: KV 1 1 2 2
        #   32 heads, 8 KV heads, 2 ranks:  runs of four, each KV head once
        #    8 heads, 2 KV heads, 4 ranks:  one run of two, its KV head also on the neighbour
        run = math.gcd(readers, len(heads))
        starts = range(heads.start, heads.stop, run)
        return HeadShard(heads, tuple(start // readers for start in starts))


@dataclass(frozen=True)
class Stage:
    """One rank's place in a pipeline: which run of the model's layers it computes."""

    index: int = 0
    count: int = 1
    split: tuple[int, ...] = ()
    """Layers of each stage; empty: equally many, as far as they can be divided."""

    @property
    def is_first(self) -> bool:
        """Whether token ids come in here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether tokens are drawn here."""
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> Span:
        """This stage's layers. In an even split the earlier stages take what is left over: the last has the head.

        Raises:
            ConfigError: there are fewer layers than stages, or the split is for another number of either.
        """
        if self.split:
            if len(self.split) != self.count or sum(self.split) != num_layers or 0 in self.split:
                split = ",".join(map(str, self.split))
                message = f"--layer-split: {split} does not give {num_layers} layers to {self.count} stages"
                raise ConfigError(message, key="layer_split")
            start = sum(self.split[: self.index])
            return Span(start, start + self.split[self.index])
        if self.count > num_layers:
            message = f"--pipeline-parallel: {self.count} stages for {num_layers} layers"
            raise ConfigError(message, key="pipeline_parallel")
        start, stop = (
            -(-num_layers * index // self.count) for index in (self.index, self.index + 1)
        )
        return Span(start, stop)

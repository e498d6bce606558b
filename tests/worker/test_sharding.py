"""Who holds what: every row once, every query head beside its KV head."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import ConfigError
from orchestra.worker.sharding import Shard


@given(total=st.integers(0, 1000), size=st.integers(1, 16))
def test_spans_cover_every_row_once(total: int, size: int) -> None:
    shards = [Shard(rank, size) for rank in range(size)]
    rows = [
        row for shard in shards for row in range(shard.span(total).start, shard.span(total).stop)
    ]
    assert rows == list(range(total))
    lengths = [len(shard.span(total)) for shard in shards]
    assert max(lengths) - min(lengths) <= 1


@given(total=st.integers(1, 1000), size=st.integers(1, 16))
def test_padded_spans_cover_every_row_once(total: int, size: int) -> None:
    shards = [Shard(rank, size) for rank in range(size)]
    for shard in shards:
        span = shard.padded_span(total)
        assert 0 <= len(span) <= shard.padded_rows(total)
        # A row stands on the rank, and at the place there, where the gathered columns show it.
        assert len(span) == 0 or span.start == shard.rank * shard.padded_rows(total)
    assert sum(len(shard.padded_span(total)) for shard in shards) == total


@given(
    num_kv_heads=st.integers(1, 12),
    readers=st.integers(1, 12),
    size=st.integers(1, 24),
)
def test_query_heads_find_their_kv_head(num_kv_heads: int, readers: int, size: int) -> None:
    num_heads = num_kv_heads * readers
    if num_heads % size:
        with pytest.raises(ConfigError, match="do not divide"):
            Shard(0, size).heads(num_heads, num_kv_heads)
        return
    for rank in range(size):
        heads = Shard(rank, size).heads(num_heads, num_kv_heads)
        local = len(heads.heads)
        assert local == num_heads // size
        group = local // len(heads.kv_heads)
        assert group * len(heads.kv_heads) == local
        for index in range(local):
            assert heads.kv_heads[index // group] == (heads.heads.start + index) // readers


def test_kv_heads_are_repeated_only_where_they_must() -> None:
    assert Shard(1, 2).heads(32, 8).kv_heads == (4, 5, 6, 7)
    assert Shard(1, 4).heads(8, 2).kv_heads == (0,)
    assert Shard(2, 4).heads(8, 2).kv_heads == (1,)
    assert Shard(1, 3).heads(12, 4).kv_heads == (1, 1, 2, 2)

"""Padded, replayed decode steps beside the same steps computed as usual.

Without a GPU nothing can be recorded: what stands for a recording calls the computation again.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestra.errors import ConfigError
from orchestra.worker.assembly import Rank, warm_up
from orchestra.worker.config import WorkerConfig
from orchestra.worker.decode_graphs import Compute, CudaRecorder, DecodeGraphs, decode_sizes
from orchestra.worker.decode_inputs import DecodeInputs
from orchestra.worker.drawn import LatestTokens
from orchestra.worker.graph_choice import graph_bytes, uses_graphs
from orchestra.worker.kv_cache import KvCacheSpec
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.parallel import SingleRank
from orchestra.worker.plan import NONE_PENDING, PENDING_TOKEN
from orchestra.worker.sharding import Shard, Stage
from orchestra.worker.staging import Staging, StagingRing
from tests.worker.conftest import Checkpoints, MakeRank, Reference
from tests.worker.plans import PlanBuilder, sampling_start
from tests.worker.test_logits import assert_close, prompt

pytestmark = pytest.mark.usefixtures("fast_interpreter")

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SIZES = [2, 4]
# A window and caps, layers without, and experts; the plain ones are in the other tests.
KINDS = ["llama", "gemma2", "qwen3-moe"]


class Recorder:
    """Records on a GPU; elsewhere notes the sizes, and lets a replay compute again."""

    def __init__(self) -> None:
        self.num_replays = 0
        self._record: Callable[[Compute], Compute] = CudaRecorder() if HAS_GPU else lambda c: c

    def __call__(self, compute: Compute) -> Compute:
        recorded = self._record(compute)

        def replay() -> Tensor | None:
            self.num_replays += 1
            return recorded()

        return replay


def with_graphs(rank: Rank, recorder: Recorder, sizes: Sequence[int] = SIZES) -> DecodeGraphs:
    """Gives a rank recorded decode steps."""
    runner = rank.runner
    inputs = DecodeInputs(sizes[-1], -(-rank.max_model_len // 16), DEVICE)
    attention = runner._attention
    graphs = DecodeGraphs(runner._model, attention, inputs, sizes, rank.max_model_len, recorder)  # type: ignore[arg-type]
    runner.recorded = graphs
    graphs.record()
    recorder.num_replays = 0
    return graphs


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_compute_the_same(
    kind: str, make_rank: MakeRank, reference: Reference
) -> None:
    rank = make_rank(
        kind, attention="triton", device=DEVICE.type, cuda_graphs="off", max_model_len=256
    )
    recorder = Recorder()
    with_graphs(rank, recorder)
    builder = PlanBuilder(rank.num_blocks)
    expected_replays = 0
    lengths = {"a": 24, "b": 3, "c": 7}
    for index, (name, length) in enumerate(lengths.items()):
        builder.add(name, prompt(length, seed=index))
    for step in (
        lengths,  # prompts: not replayed
        dict.fromkeys("abc", 1),  # three in four rows
        {"b": 1},
        {"a": 1, "c": 1},
        dict.fromkeys("abc", 1),
    ):
        plan = builder.plan(step)
        logits = rank.runner.forward(plan)
        assert logits is not None
        expected_replays += step is not lengths
        assert recorder.num_replays == expected_replays
        names = {m.slot: name for name, m in builder.sequences.items()}
        for slot, row in zip(plan.sample_slots, logits, strict=True):
            sequence = builder.sequences[names[int(slot)]]
            expected = reference(kind, sequence.tokens)[-1]
            assert_close(row, expected)
            sequence.tokens.append(int(row.argmax()))


def test_only_steps_that_decode_and_draw_are_replayed(make_rank: MakeRank) -> None:
    rank = make_rank("llama", attention="triton", device=DEVICE.type, cuda_graphs="off")
    graphs = with_graphs(rank, Recorder())
    builder = PlanBuilder(rank.num_blocks)
    for name in "abcde":
        builder.add(name, prompt(4))
    assert not graphs.takes(builder.plan(dict.fromkeys("abcde", 3)))
    plan = builder.plan(dict.fromkeys("abc", 1))
    assert graphs.takes(plan)
    assert not graphs.takes(replace(plan, fills_blocks=True))
    # Another order of the draws, one that does not draw, and more than were recorded.
    assert not graphs.takes(replace(plan, sample_sequences=np.array([0, 2, 1], np.int32)))
    assert not graphs.takes(replace(plan, sample_sequences=np.array([0, 1], np.int32)))
    for name in "abc":
        builder.append(name, 9)
    assert not graphs.takes(builder.plan(dict.fromkeys("abcde", 1)))
    graphs.forget()
    assert not graphs.takes(plan)
    rank.runner.execute(replace(plan, starts=tuple(sampling_start(slot) for slot in range(3))))
    # A group that has formed again warms up, and records again.
    warm_up(rank.runner, rank.block_size)
    assert graphs.takes(plan)


def test_pending_tokens_are_filled_in_where_the_recording_reads(make_rank: MakeRank) -> None:
    rank = make_rank("llama", attention="triton", device=DEVICE.type, cuda_graphs="off")
    graphs = with_graphs(rank, Recorder())
    builder = PlanBuilder(rank.num_blocks)
    for name in "abc":
        builder.add(name, [PENDING_TOKEN] if name == "b" else [7])
    plan = builder.plan(dict.fromkeys("abc", 1))
    latest = LatestTokens(8, DEVICE, SingleRank())
    latest.note(np.array([2, 1], np.int32), torch.tensor([5, 9], device=DEVICE))
    known = replace(plan, token_ids=np.array([7, 9, 7], np.int32), pending=NONE_PENDING)
    with torch.inference_mode():
        filled, expected = (graphs.run(it, latest).whole().clone() for it in (plan, known))  # type: ignore[union-attr]
    assert torch.equal(filled, expected)


def test_logits_of_all_sizes_share_memory(make_rank: MakeRank) -> None:
    rank = make_rank("llama", attention="triton", device=DEVICE.type, cuda_graphs="off")
    # What stands for the recording of the largest size gives new memory with each call.
    graphs = with_graphs(rank, Recorder(), sizes=[1, 2, 4])
    builder = PlanBuilder(rank.num_blocks)
    places = set()
    for names in ("a", "bc"):
        for name in names:
            builder.add(name, prompt(1))
        with torch.inference_mode():
            logits = graphs.run(builder.plan(dict.fromkeys(names, 1)))
        assert logits is not None
        whole = logits.whole()
        assert whole.shape == (len(names), 512)
        places.add(whole.data_ptr())
    assert len(places) == 1


def test_sizes_are_few_and_end_at_the_limit() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(6) == [1, 2, 4, 6]
    assert decode_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert decode_sizes(48) == [1, 2, 4, 8, 16, 32, 48]
    assert decode_sizes(256)[-2:] == [240, 256]


def test_rows_behind_a_step_pad() -> None:
    inputs = DecodeInputs(max_size=6, max_blocks=4, device=DEVICE)
    builder = PlanBuilder(64)
    for name in "abcd":
        builder.add(name, list(range(40)))
    builder.plan(dict.fromkeys("abcd", 39))
    inputs.fill(builder.plan(dict.fromkeys("abcd", 1)))
    assert inputs.context_lens.tolist() == [40, 40, 40, 40, 0, 0]
    # A smaller step leaves nothing of a larger one behind.
    builder.add("e", [7, 8])
    builder.plan({"e": 1})
    plan = builder.plan({"e": 1})
    inputs.fill(plan)
    assert inputs.token_ids.tolist() == [8, 0, 0, 0, 0, 0]
    assert inputs.positions.tolist() == [1, 0, 0, 0, 0, 0]
    assert inputs.slots.tolist() == [int(plan.slot_mapping[0]), -1, -1, -1, -1, -1]
    assert inputs.context_lens.tolist() == [2, 0, 0, 0, 0, 0]
    assert inputs.table_width.tolist() == [1]
    assert inputs.block_tables[0] == plan.block_tables[0, 0]


def test_arrays_are_sent_in_one_piece_and_stay() -> None:
    staging = Staging(DEVICE)
    rng = np.random.default_rng(0)
    sent, kept = [], []
    for length in (3, 0, 1000, 17):
        arrays = [rng.integers(-5, 1 << 30, size) for size in (length, 1, length + 2)]
        sent.append(staging.send(arrays))
        kept.append(arrays)
    for tensors, arrays in zip(sent, kept, strict=True):
        assert [tensor.tolist() for tensor in tensors] == [array.tolist() for array in arrays]
        assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_a_piece_is_not_written_while_the_last_copy_may_read_it() -> None:
    ring = StagingRing(DEVICE)
    first, second = ring.take(4), ring.take(4)
    assert not np.shares_memory(first, second)
    assert np.shares_memory(ring.take(4), first)


def spec_of(config: ModelConfig) -> KvCacheSpec:
    return KvCacheSpec(config.num_layers, config.num_kv_heads, config.head_dim, 16, torch.bfloat16)


def test_graphs_are_recorded_where_they_can_be(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    cuda = torch.device("cuda")

    def uses(kind: str = "llama", device: torch.device = cuda, **settings: object) -> bool:
        model_dir = checkpoint(kind)
        config = WorkerConfig(model_dir, "", "w", kind, **settings)  # type: ignore[arg-type]
        model_config = ModelConfig.from_directory(model_dir)
        return uses_graphs(config, model_config, spec_of(model_config), device)

    assert uses()
    assert uses("mixtral")
    assert not uses("deepseek2")
    assert not uses(cuda_graphs="off")
    # Several ranks would record NCCL's collectives: only where that is asked for.
    assert not uses(shard=Shard(0, 2))
    assert uses(shard=Shard(0, 2), cuda_graphs="on")
    reasons = {
        "there is no GPU": {"device": torch.device("cpu")},
        "the attention backend is torch": {"attention": "torch"},
        "stages": {"stage": Stage(0, 2)},
    }
    for reason, settings in reasons.items():
        assert not uses(**settings)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=reason) as raised:
            uses(**settings, cuda_graphs="on")  # type: ignore[arg-type]
        assert raised.value.key == "cuda_graphs"


def test_what_graphs_keep_is_counted(checkpoint: Checkpoints) -> None:
    model_config = ModelConfig.from_directory(checkpoint("llama"))
    config = WorkerConfig(checkpoint("llama"), "", "w", "llama", max_num_seqs=64)
    taken = graph_bytes(config, model_config, max_blocks=1000)
    # At least the logits, twice, and the block tables.
    assert taken > 64 * (2 * 512 + 1000) * 4
    more = replace(config, max_num_seqs=128)
    assert graph_bytes(more, model_config, max_blocks=1000) > taken

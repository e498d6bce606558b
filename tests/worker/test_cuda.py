"""The worker on an NVIDIA GPU; run by `make gpu`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from orchestra.worker.decode_graphs import CudaRecorder
from orchestra.worker.parallel import ProcessGroup
from orchestra.worker.sampler import Sampler
from orchestra.worker.sharding import Shard
from tests.checkpoints import FAMILIES, KINDS
from tests.worker.conftest import MakeRank, Reference
from tests.worker.plans import PlanBuilder, sampling_start
from tests.worker.test_async_scheduling import assert_same
from tests.worker.test_async_scheduling import run as run_steps
from tests.worker.test_logits import (
    Run,
    assert_bfloat16_is_close,
    prompt,
    swap_and_come_back,
)

pytestmark = pytest.mark.gpu


# At its defaults, which are the kernels and recorded steps where a model can have them; and without.
@pytest.mark.parametrize("settings", [{}, {"attention": "torch", "cuda_graphs": "off"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_with_transformers(
    kind: str, settings: dict[str, str], make_rank: MakeRank, reference: Reference
) -> None:
    run = Run(make_rank(kind, device="cuda", max_num_seqs=8, **settings), kind, reference)
    run.builder.add("whole", prompt(75))
    run.builder.add("chunked", prompt(40, seed=1))
    run.step(whole=75, chunked=16)
    run.step(whole=1, chunked=20)
    run.step(whole=1, chunked=4)
    run.step(whole=1, chunked=1)
    assert run.num_compared == 6


def test_swapped_sequences_come_back(make_rank: MakeRank, reference: Reference) -> None:
    rank = make_rank("qwen2", device="cuda", num_host_blocks=6)
    swap_and_come_back(rank, "qwen2", reference)


# With recorded decode steps, whose inputs and logits lie where those of the step before do.
@pytest.mark.parametrize("settings", [{}, {"cuda_graphs": "off"}], ids=str)
def test_steps_ahead_draw_the_same(settings: dict[str, str], make_rank: MakeRank) -> None:
    rank = make_rank("llama", device="cuda", max_num_seqs=8, **settings)
    assert rank.plans_ahead
    assert_same(run_steps([rank], ahead=1), run_steps([rank], ahead=0))


def test_greedy_tokens_are_the_same(make_rank: MakeRank, reference: Reference) -> None:
    rank = make_rank("llama", device="cuda", cuda_graphs="on", max_num_seqs=8)
    builder = PlanBuilder(rank.num_blocks)
    builder.add("a", prompt(300))
    for step in range(64):
        logits = rank.runner.forward(builder.plan({"a": 1 if step else 300}))
        assert logits is not None
        builder.append("a", int(logits[0].argmax()))
    drawn = builder.sequences["a"].tokens
    expected = reference("llama", drawn)[299:-1].argmax(-1)
    assert drawn[300:] == expected.tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_stays_close(kind: str, make_rank: MakeRank, reference: Reference) -> None:
    assert_bfloat16_is_close(kind, make_rank, reference, device="cuda")


def test_nccl_sums_are_recorded(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    group = ProcessGroup(Shard(), FileStore(str(tmp_path / "store"), 1), device)
    try:
        numbers = torch.arange(8.0, device=device)

        def compute() -> Tensor | None:
            summed = numbers * 2
            group.all_reduce(summed)
            return group.gather_columns(summed.view(2, 4))

        replay = CudaRecorder()(compute)
        numbers.add_(1)
        replayed = replay()
        assert replayed is not None
        assert torch.equal(replayed.flatten(), numbers * 2)
    finally:
        group.close()


def test_gpu_draws_what_the_cpu_draws() -> None:
    logits = torch.randn(8, 5000, generator=torch.Generator().manual_seed(3)) * 3
    drawn = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        sampler = Sampler(5000, 8, device)
        params = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2}
        sampler.start(
            [sampling_start(slot, seed=slot, prompt_token_ids=[1], **params) for slot in range(8)]
        )
        slots = np.arange(8, dtype=np.int32)
        drawn.append(sampler.draw(logits.to(device), slots, slots, -1).fetch().token_ids.tolist())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("top", [-1, 3])
def test_a_draw_waits_for_nothing_before_its_results_are_fetched(
    top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    sampler = Sampler(5000, 8, device)
    params = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    biased = {"logit_bias_ids": [7], "logit_bias_values": [2.0]}
    starts = [
        *(sampling_start(slot, seed=slot, prompt_token_ids=[1], **params) for slot in range(5)),
        sampling_start(5),
        sampling_start(6, temperature=1.0, top_k=2000),
        sampling_start(7, temperature=1.0, top_k=40, **biased),
    ]
    slots = np.arange(8, dtype=np.int32)
    logits = torch.randn(8, 5000, device=device) * 8
    sampler.start(starts)
    sampler.draw(logits, slots, slots, top).fetch()  # memory is taken, kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.start(starts[4:])
        drawn = sampler.draw(logits, slots, slots + 1, top)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(drawn.fetch().token_ids) == len(slots)

"""The worker on an NVIDIA GPU; run by `make gpu`."""

import numpy as np
import pytest
import torch

from orchestra.worker.sampler import Sampler
from tests.checkpoints import KINDS
from tests.worker.conftest import MakeRank, Reference
from tests.worker.plans import sampling_start
from tests.worker.test_logits import Run, prompt, swap_and_come_back

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_with_transformers(
    kind: str, make_rank: MakeRank, reference: Reference
) -> None:
    run = Run(make_rank(kind, device="cuda"), kind, reference)
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
        drawn.append(sampler.sample(logits.to(device), slots, slots, -1).token_ids.tolist())
    assert drawn[0] == drawn[1]

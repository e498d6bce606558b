"""What another worker waits for is announced layer by layer, when it is there."""

from dataclasses import replace

import numpy as np

from tests.worker.conftest import MakeRank
from tests.worker.plans import PlanBuilder, sampling_start


def test_each_layer_is_announced_when_its_kv_is_in_the_pool(make_rank: MakeRank) -> None:
    rank = make_rank("llama")
    num_layers = rank.model_config.num_layers
    memory = np.asarray(rank.kv_pool).reshape(num_layers, rank.num_blocks, -1)
    builder = PlanBuilder(rank.num_blocks, seed=3)
    builder.add("a", list(range(20, 60)))
    plan = builder.plan({"a": 40}, [sampling_start(0)])
    blocks = builder.sequences["a"].blocks
    assert 0 not in blocks, "the warm-up wrote to block 0"
    announced: list[tuple[int, int]] = []

    def listen(step_id: int, layer: int) -> None:
        announced.append((step_id, layer))
        written = [memory[at][blocks].any(axis=1).all() for at in range(num_layers)]
        assert written == [at <= layer for at in range(num_layers)]

    rank.runner.watch(listen)
    rank.runner.execute(replace(plan, fills_blocks=True))
    assert announced == [(plan.step_id, layer) for layer in range(num_layers)]
    builder.append("a", 7)
    rank.runner.execute(builder.plan({"a": 1}))
    assert len(announced) == num_layers, "nobody waits for this step"

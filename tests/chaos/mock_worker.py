"""A mock worker: the real agent and its step scheduler around a model that computes nothing.

The next token is a hash of the last one and its place, so that a token that was lost, doubled or drawn for the wrong
place spoils all that follow it. Where log-probabilities are asked for, they are the worker's number: a reader can tell
who drew what.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from orchestra import _core
from orchestra.worker.plan import PlanReader, StepOutput, StepPlan
from tests.chaos.tokens import VOCAB_SIZE, next_token
from tests.e2e.stack import DEMO

BLOCK_SIZE = 16
NUM_BLOCKS = 4096
MAX_NUM_SEQS = 64
MAX_MODEL_LEN = 1024


def draw(plan: StepPlan, number: int) -> StepOutput:
    """The tokens of a step."""
    ends = plan.query_start[1:][plan.sample_sequences] - 1
    last = plan.token_ids[ends]
    drawn = [
        next_token(int(token), int(place))
        for token, place in zip(last, plan.sample_positions, strict=True)
    ]
    count, alternatives = len(drawn), max(plan.num_top_logprobs, 0)
    chosen = count if plan.num_top_logprobs >= 0 else 0
    return StepOutput(
        token_ids=np.array(drawn, np.int32),
        chosen_logprobs=np.full(chosen, -number, np.float32),
        top_ids=np.tile(np.array(drawn, np.int32)[:, None], (1, alternatives)),
        top_logprobs=np.full((count, alternatives), -number, np.float32),
    )


def main(router: str, number: str, step_ms: str) -> None:
    """Serves until it is killed."""
    settings = {
        "router": router,
        "worker_id": f"mock-{number}",
        "model": "mock",
        "weights_epoch": 0,
        "vocab_size": VOCAB_SIZE,
        "model_files": {
            "tokenizer_json": (DEMO / "tokenizer.json").read_bytes(),
            "tokenizer_config_json": b"",
            "generation_config_json": b"",
            "chat_template": "",
        },
        "scheduler": {
            "block_size": BLOCK_SIZE,
            "num_blocks": NUM_BLOCKS,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_model_len": MAX_MODEL_LEN,
        },
    }
    agent = _core.Agent(settings)
    reader = PlanReader(MAX_NUM_SEQS, MAX_MODEL_LEN // BLOCK_SIZE)
    while True:
        message = agent.next_step(200)
        if message is None:
            continue
        plan = reader.read(message)
        # What a model would take.
        time.sleep(float(step_ms) / 1e3)
        out = draw(plan, int(number))
        agent.commit(
            plan.step_id,
            out.token_ids.tobytes(),
            out.chosen_logprobs.tobytes(),
            out.top_ids.tobytes(),
            out.top_logprobs.tobytes(),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

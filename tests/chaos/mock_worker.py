"""A mock worker: the real agent and its step scheduler around a model that computes nothing.

The next token is a hash of the last one and its place, so that a token that was lost, doubled or drawn for the wrong
place spoils all that follow it. Where log-probabilities are asked for, they are the worker's number: a reader can tell
who drew what.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from orchestra import _core
from orchestra.worker.plan import PlanReader, StepOutput, StepPlan
from tests.chaos.tokens import VOCAB_SIZE, next_token
from tests.e2e.stack import DEMO

BLOCK_SIZE = 16
MAX_NUM_SEQS = 64


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


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mock_worker", description=__doc__)
    parser.add_argument("router", help="URL of its workers' port")
    parser.add_argument("number", type=int, help="tells it from others, in log-probabilities too")
    parser.add_argument("step_ms", type=float, help="what a model would take for a step")
    parser.add_argument("--num-blocks", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    return parser.parse_args()


def main() -> None:
    """Serves until it is killed."""
    args = parse_args()
    settings = {
        "router": args.router,
        "worker_id": f"mock-{args.number}",
        "model": "mock",
        "weights_epoch": 0,
        "vocab_size": VOCAB_SIZE,
        "model_files": {
            "tokenizer_json": (DEMO / "tokenizer.json").read_bytes(),
            "tokenizer_config_json": (DEMO / "tokenizer_config.json").read_bytes(),
            "generation_config_json": b"",
            "chat_template": "",
        },
        "scheduler": {
            "block_size": BLOCK_SIZE,
            "num_blocks": args.num_blocks,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_model_len": args.max_model_len,
            "max_num_batched_tokens": args.max_num_batched_tokens,
        },
    }
    agent = _core.Agent(settings)
    reader = PlanReader(MAX_NUM_SEQS, args.max_model_len // BLOCK_SIZE)
    while True:
        message = agent.next_step(200)
        if message is None:
            continue
        plan = reader.read(message)
        time.sleep(args.step_ms / 1e3)
        out = draw(plan, args.number)
        agent.commit(
            plan.step_id,
            out.token_ids.tobytes(),
            out.chosen_logprobs.tobytes(),
            out.top_ids.tobytes(),
            out.top_logprobs.tobytes(),
        )


if __name__ == "__main__":
    main()

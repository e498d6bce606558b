"""`python -m benches.collectives_nodes.overlap`: prefill steps of two ranks whose sums go over a link of limited rate.

Two ranks of `--tp 2`, each a node of its own (see `network`), with one thread each. Four ways take turns, in the same
processes: the step with its sums overlapped, the step with each sum before what follows it, the step with sums that do
nothing (what is computed), and its sums alone (what is communicated). A step takes as long as its slower rank. Prints,
for each rate, a table of medians. Overlapping two things that do not need the same resources takes as long as the
longer one at best: the bound. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from benches.collectives_nodes.network import MissingError, run_ranks, two_nodes
from benches.machine import commit, processor
from benches.serving.checkpoint import SHAPES, random_model
from orchestra.worker.assembly import Place, build_rank
from orchestra.worker.config import WorkerConfig
from orchestra.worker.group import Group
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.node_group import NodeGroup
from orchestra.worker.plan import StepPlan
from orchestra.worker.sharding import Shard
from orchestra.worker.topology import Topology
from tests.worker.plans import BLOCK_SIZE, PlanBuilder

if TYPE_CHECKING:
    from orchestra.worker.parallel import Communicator

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "models" / "demo"
RANKS = 2
RATES = ["500mbit", "1gbit", "4gbit"]
TOKENS = [256, 512, 1024, 2048]
NUM_BLOCKS = 2 * max(TOKENS) // BLOCK_SIZE
TIMEOUT = timedelta(minutes=5)
OVERLAPPED, IN_ORDER, COMPUTED, ADDED_UP = "overlapped", "in order", "computed", "added up"

Forward = Callable[[StepPlan], Tensor | None]


class Silent:
    """A communicator that leaves every tensor as it is."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def all_reduce(self, _tensor: Tensor) -> None:
        """Does nothing."""

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Does nothing."""
        return tensor

    def close(self) -> None:
        """Does nothing."""


def steps(given: argparse.Namespace, group: NodeGroup) -> tuple[ModelConfig, dict[str, Forward]]:
    """The ways to compute a step."""
    model_dir = random_model(given.model, given.cache, DEMO)
    model_config = ModelConfig.from_directory(model_dir)
    dtype = getattr(torch, given.dtype)
    place = Place(torch.device("cpu"), dtype, local_size=RANKS)

    def forward(communicator: Communicator, min_tokens: int) -> Forward:
        config = WorkerConfig(
            *(model_dir, "", "", "", group.shard),
            num_blocks=NUM_BLOCKS,
            max_num_seqs=8,
            max_num_batched_tokens=max(TOKENS),
            overlap_min_tokens=min_tokens,
        )
        joined = Group(communicator)
        rank = build_rank(config, model_config, place, joined, lambda _done, _total: None)
        return rank.runner.forward

    ways = {OVERLAPPED: (group, 1), IN_ORDER: (group, 0), COMPUTED: (Silent(group.shard), 0)}
    return model_config, {name: forward(*way) for name, way in ways.items()}


def rank_main(given: argparse.Namespace) -> None:
    """Measures on one rank; leaves `{tokens: {way: seconds}}` in a file."""
    torch.set_num_threads(1)
    shard = Shard(given.rank, RANKS)
    store = dist.FileStore(str(given.folder / "store"), RANKS)
    group = NodeGroup(
        *(shard, Topology.of("ab"), store, torch.device("cpu")),
        generation=0,
        timeout=TIMEOUT,
        use_shared_memory=False,
    )
    config, ways = steps(given, group)
    taken: dict[int, dict[str, list[float]]] = {}
    for num_tokens in TOKENS:
        builder = PlanBuilder(NUM_BLOCKS)
        builder.add("a", [7 * at % config.vocab_size for at in range(num_tokens)])
        plan = builder.plan({"a": num_tokens})
        hidden = torch.zeros(num_tokens, config.hidden_size, dtype=getattr(torch, given.dtype))

        def add_up(hidden: Tensor = hidden) -> None:
            # The embedding, and twice in every layer but the last, which finishes only what is sampled from.
            for _ in range(2 * config.num_layers - 1):
                group.all_reduce(hidden)

        calls: dict[str, Callable[[], object]] = {
            name: lambda forward=forward, plan=plan: forward(plan)  # type: ignore[misc]
            for name, forward in ways.items()
        }
        calls[ADDED_UP] = add_up
        taken[num_tokens] = {name: [] for name in calls}
        for repeat in range(-1, given.repeats):
            for name, call in calls.items():
                group.all_gather(torch.zeros(1))
                start = time.perf_counter()
                call()
                if repeat >= 0:
                    taken[num_tokens][name].append(time.perf_counter() - start)
    (given.folder / f"result-{given.rank}").write_text(json.dumps(taken))
    group.close()


def print_table(results: list[dict[str, dict[str, list[float]]]], rate: str) -> None:
    """Medians in milliseconds."""
    columns = [COMPUTED, ADDED_UP, IN_ORDER, OVERLAPPED]
    print(f"{rate}\n\n| tokens | {' | '.join(columns)} | overlapped / in order | bound |")
    print("|---" * (len(columns) + 3) + "|")
    for num_tokens in TOKENS:
        every = [result[str(num_tokens)] for result in results]
        slower = {
            name: [1e3 * max(pair) for pair in zip(*(rank[name] for rank in every), strict=True)]
            for name in columns
        }
        medians = {name: statistics.median(times) for name, times in slower.items()}
        # Repeat by repeat: neighbours in time saw the same machine.
        pairs = zip(slower[OVERLAPPED], slower[IN_ORDER], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        parts = medians[COMPUTED], medians[ADDED_UP]
        cells = " | ".join(f"{medians[name]:.1f}" for name in columns)
        print(f"| {num_tokens} | {cells} | {ratio:.2f} | {max(parts) / sum(parts):.2f} |")
    print()


def main() -> None:
    """For each rate makes the nodes, runs the ranks and prints a table; or is one of the ranks."""
    parser = argparse.ArgumentParser(prog="python -m benches.collectives_nodes.overlap")
    parser.add_argument("--rates", nargs="+", default=RATES, help="of the link, each way")
    parser.add_argument("--repeats", type=int, default=7, help="of each way (default: 7)")
    parser.add_argument("--model", choices=list(SHAPES), default="60m", help="a random Llama")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "bench-models")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given)
        return
    random_model(given.model, given.cache, DEMO)
    print(f"{given.model}, {given.dtype}, a thread for each of {RANKS} ranks; ms, medians of")
    print(f"{given.repeats}; {processor()}, commit {commit()}\n")
    for rate in given.rates:
        own = [sys.executable, "-m", "benches.collectives_nodes.overlap", *sys.argv[1:]]
        try:
            with two_nodes(rate) as nodes, tempfile.TemporaryDirectory() as folder:
                results = run_ranks(nodes, own, Path(folder), RANKS)
        except MissingError as error:
            raise SystemExit(f"no nodes can be made here: {error}") from error
        print_table(results, rate)


if __name__ == "__main__":
    main()

"""`python -m benches.scheduler`: choose, reserve and give back from Python, beside Dynamo's `SelectionService`.

Needs `pip install ai-dynamo-runtime==1.6.1` beside Orchestra. Both sides live in one process and take turns of some
hundred cycles; every sample counts.
"""

import argparse
import asyncio
import random
import sys

from benches.scheduler import index
from benches.scheduler.dynamo_side import DynamoSide
from benches.scheduler.orchestra_side import OrchestraSide
from benches.scheduler.workload import NUM_PROMPTS, Cell, default_cells


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.scheduler", description=__doc__)
    parser.add_argument("--cells", nargs="*", help="only these, such as `1024x128`")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side in each cell")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


async def run_cell(cell: Cell, turns: int, seed: int) -> str:
    """A line of the table."""
    prompts = cell.prompts(seed)
    ours, theirs = OrchestraSide(cell, prompts), DynamoSide()
    await theirs.register(cell, prompts)
    draw = random.Random(seed)
    for _ in range(turns):
        picks = [draw.randrange(NUM_PROMPTS) for _ in range(cell.cycles)]
        ours.turn(picks)
        await theirs.turn(picks)
    theirs.service.shutdown()
    both = [ours.decide, ours.decide_list, ours.decide_and_store, theirs.select]
    times = " | ".join(f"{side.at(0.5):.1f} / {side.at(0.99):.0f}" for side in both)
    ratio = theirs.select.at(0.5) / ours.decide.at(0.5)
    stored_ratio = theirs.select.at(0.5) / ours.decide_and_store.at(0.5)
    rates = f"{ours.registered_per_s:.0f} | {theirs.registered_per_s:.0f}"
    return f"| {cell.name} | {times} | {ratio:.0f} | {stored_ratio:.1f} | {rates} |"


async def main() -> None:
    """Prints both tables."""
    args = parse_args()
    cells = default_cells()
    if args.cells:
        cells = [cell for cell in cells if cell.name.replace(" ", "") in args.cells]
    print(
        "| workers x blocks | ours, buffer µs p50 / p99 | ours, list | ours, buffer + stored | Dynamo, list | ratio "
        "| ratio, stored | workers/s registered, ours | Dynamo |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for cell in cells:
        print(await run_cell(cell, args.turns, args.seed), flush=True)
    print("\n| index | entries | M blocks/s from Python | bytes an entry |\n|---|---|---|---|")
    for row in index.measure():
        speed = float(str(row["blocks_per_s"])) / 1e6
        print(f"| {row['side']} | {row['entries']} | {speed:.2f} | {row['bytes_per_entry']:.0f} |")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())

"""`python -m benches.context_parallel`: how long a long prompt takes to its first token, by ranks that divide it.

One rank, two that divide the prompt (`--cp 2`) and two that divide the layers (`--tp 2`), each rank with one thread,
behind a real `orchestra serve` over HTTP. All stay up and take turns prompt by prompt, so that what else happens on
the machine falls on all of them. Prints a table of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
from pathlib import Path

from benches.machine import commit, processor
from benches.serving.checkpoint import SHAPES, random_model
from benches.serving.orchestra_system import Orchestra, serving

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "models" / "demo"
SYSTEMS = {"one rank": [], "--cp 2": ["--cp", "2"], "--tp 2": ["--tp", "2"]}
PROMPTS = (128, 256, 512, 1024, 1900)
OUTPUT_TOKENS = 9


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.context_parallel")
    parser.add_argument("--model", choices=list(SHAPES), default="60m", help="a random Llama")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="prompts of each length")
    parser.add_argument(
        "--min-tokens", type=int, default=64, help="--context-min-tokens: every prompt is divided"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "bench-models")
    return parser.parse_args()


async def ask(system: Orchestra, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token, and between the others."""
    line = await system.client.connect()
    moments = await system.client.stream(prompt, OUTPUT_TOKENS, line)
    line.close()
    return moments[0], (moments[-1] - moments[0]) / (len(moments) - 1)


def main() -> None:
    """Starts the systems, asks them in turns, prints the table."""
    given = parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    checkpoint = random_model(given.model, given.cache, DEMO)
    flags = ["--dtype", given.dtype, "--device", "cpu", "--num-blocks", "1024"]
    flags += ["--context-min-tokens", str(given.min_tokens)]
    draw = random.Random(0)
    with contextlib.ExitStack() as stack:
        systems = {
            name: stack.enter_context(serving(checkpoint, [*flags, *own]))
            for name, own in SYSTEMS.items()
        }
        taken: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for repeat in range(-1, given.repeats):
            for length in PROMPTS:
                prompt = [draw.randrange(8, 32000) for _ in range(length)]
                for name, system in systems.items():
                    pair = asyncio.run(ask(system, prompt))
                    if repeat >= 0:
                        taken.setdefault((length, name), []).append(pair)
    print(
        f"{given.model}, {given.dtype}, a thread for each rank; {processor()}, commit {commit()}\n"
    )
    names = list(SYSTEMS)
    print(f"| prompt | {' | '.join(f'TTFT ms, {name}' for name in names)} | one rank / --cp 2 |")
    print("|---" * (len(names) + 2) + "|")
    for length in PROMPTS:
        first = {name: [pair[0] for pair in taken[length, name]] for name in names}
        # Repeat by repeat: neighbours in time saw the same machine.
        pairs = zip(first["one rank"], first["--cp 2"], strict=True)
        ratio = statistics.median(one / two for one, two in pairs)
        cells = " | ".join(f"{1e3 * statistics.median(first[name]):.0f}" for name in names)
        print(f"| {length} | {cells} | {ratio:.2f} |")
    each = {
        name: 1e3
        * statistics.median(
            pair[1] for key, all_ in taken.items() if key[1] == name for pair in all_
        )
        for name in names
    }
    print(
        "\nms between tokens: " + ", ".join(f"{name} {value:.1f}" for name, value in each.items())
    )


if __name__ == "__main__":
    main()

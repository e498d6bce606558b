"""A soak as Markdown and CSV."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from benches.machine import commit, processor
from tests.soak.samples import Sample, plot

if TYPE_CHECKING:
    from tests.soak.run import Soak

# Rows of the table; all samples are in the CSV.
ROWS = 15


def summary(soak: Soak) -> str:
    """What happened, in lines."""
    ends = soak.ends
    before, after = soak.before, soak.after
    total = sum(ends[name] for name in ("whole", "refused", "left", "left_early", "wrong", "open"))
    metrics = soak.metrics
    lines = [
        f"- {total} requests, {total / soak.seconds:.0f} a second: {ends['whole']} answered whole and right, "
        f"{ends['refused']} refused with 429, {ends['left'] + ends['left_early']} left by their clients "
        f"({ends['left_early']} before anything came; of {ends['unseen']} of these the router read nothing), "
        f"{ends['wrong'] + ends['open']} without a proper end",
        f"- {soak.kills['worker']} kills of workers and {soak.kills['engine']} of engines; "
        f"{metrics['orchestra_requests_replayed_total']:.0f} streams of engines continued, "
        f"{metrics['orchestra_requests_retried_total']:.0f} requests sent again before their first byte, "
        f"{metrics['orchestra_requests_preempted_total']:.0f} stopped for more urgent ones and "
        f"{metrics['orchestra_requests_resumed_total']:.0f} resumed",
        f"- the queue was empty in {soak.num_idle} of {len(soak.samples)} samples",
        f"- {soak.rotations} reloads and rotations of the access log on the way",
        f"- at rest before and after: {before.descriptors} and {after.descriptors} descriptors, "
        f"{before.threads} and {after.threads} threads, {before.rss_mb:.1f} and {after.rss_mb:.1f} MB",
    ]
    growth = soak.growth
    if growth is None:
        lines.append("- too short to say whether memory grows")
    else:
        lines.append(
            f"- memory over the second half, by a straight line: {growth.mb:+.2f} MB "
            f"({growth.mb_per_hour:+.2f} MB an hour; {growth.noise_mb:.2f} MB of noise around it), "
            f"at most {growth.allowed_mb:.2f} MB allowed"
        )
    lines += [f"- WRONG: {what}" for what in soak.wrong] or ["- nothing was wrong"]
    return "\n".join(lines)


def table(samples: list[Sample]) -> str:
    """Some of the samples."""
    every = max(1, len(samples) // ROWS)
    rows = [
        "| minute | RSS MB | descriptors | threads | CPU, cores | running | waiting | workers | engines | requests |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {sample.at_s / 60:.1f} | {sample.rss_mb:.1f} | {sample.descriptors} | {sample.threads} "
        f"| {sample.cpu:.2f} | {sample.running} | {sample.waiting} | {sample.workers} | {sample.engines} "
        f"| {sample.requests} |"
        for sample in samples[every - 1 :: every]
    ]
    return "\n".join(rows)


def write(folder: Path, soak: Soak, seed: int) -> Path:
    """Writes `soak.md` and `samples.csv`; the path of the first."""
    with (folder / "samples.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(Sample)])
        rows.writeheader()
        rows.writerows(asdict(sample) for sample in soak.samples)
    path = folder / "soak.md"
    path.write_text(
        f"# Soak of {soak.seconds / 60:g} minutes\n\n"
        f"`python -m tests.soak --minutes {soak.seconds / 60:g} --seed {seed}`, commit {commit()}, {processor()}\n\n"
        f"{summary(soak)}\n\n{table(soak.samples)}\n\n```text\n{plot(soak.samples)}\n```\n"
    )
    return path

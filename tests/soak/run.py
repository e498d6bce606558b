"""One soak: a router, what is behind it, its load, and everything that has to be right at the end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.processes import Engine, eventually, running_engine, running_router
from tests.soak.cases import FOREIGN, TENANTS
from tests.soak.ledger import AccessLog, Ledger
from tests.soak.load import NUM_WORKERS, Fleet, Load, ended
from tests.soak.samples import Growth, Sample, Sampler, figures

KINDS = ("vllm", "vllm", "sglang", "llama.cpp")
PACE = ("--ttft", "10ms", "--itl", "10ms", "--model", FOREIGN)
# Seats and places in the queue: fewer than clients.
LIMITS = ("--max-concurrent-requests", "48", "--max-queued-requests", "44")
# The last tenant has fewer places than it wants.
TENANTS_FILE = "".join(
    f'[[tenant]]\nname = "{name}"\nweight = {weight}\nmax_queued_requests = {queued}\n'
    for name, weight, queued in zip(TENANTS, (300, 100, 100), (44, 44, 10), strict=True)
)
# What an engine's cache holds: so little that the router's index of it is full, and forgets, after some minutes.
KV_TOKENS = 65_536
# Samples without saturation: where the machine has no time for the clients, the queue runs empty for a moment.
IDLE_SHARE_MAX = 0.2
ROTATE_EVERY = 6
LOG = "access.log"
# Shorter runs have not filled the prefix indexes and the allocator's arenas by their half, and a busy machine's few
# seconds may pass without a full queue.
JUDGED_FROM_S = 600.0
END_TIMEOUT_S = 20.0


@dataclass
class Soak:
    """What came of it."""

    seconds: float
    # The router at rest, before the load and after it.
    before: Sample
    after: Sample
    samples: list[Sample] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    continued: int = 0
    rotations: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def num_idle(self) -> int:
        """Samples in which nothing waited."""
        return sum(sample.waiting == 0 for sample in self.samples)

    @property
    def growth(self) -> Growth | None:
        """Of the memory; nothing can be said of it before the caches are full."""
        return Growth.of(self.samples) if self.seconds >= JUDGED_FROM_S else None

    def check(self, what: str, is_right: bool) -> None:
        """Notes what is wrong."""
        if not is_right:
            self.wrong.append(what)


class Watch:
    """Takes samples and reads the access log while the load runs."""

    def __init__(self, soak: Soak, sampler: Sampler, log: AccessLog, load: Load) -> None:
        self.soak = soak
        self.sampler = sampler
        self.log = log
        self.load = load

    def run(self, every_s: float, say: Callable[[str], None]) -> None:
        """Until the load is over."""
        ledger = self.load.ledger
        while True:
            time.sleep(every_s)
            self.log.read()
            if self.load.is_over:
                return
            sample = self.sampler.take(sum(ledger.lines))
            self.soak.samples.append(sample)
            if len(self.soak.samples) % ROTATE_EVERY == 0:
                self.log.rotate(lambda: self.sampler.process.send_signal(signal.SIGHUP))
                self.soak.rotations += 1
            say(
                f"{sample.at_s:6.0f} s  {sample.rss_mb:6.1f} MB  {sample.descriptors:4} descriptors  "
                f"{sample.threads:3} threads  {sample.running:3} run  {sample.waiting:3} wait  "
                f"{sample.requests:8} requests  {sum(self.load.kills.values()):4} kills  "
                f"{len(ledger.wrong):3} wrong"
            )


def run(
    folder: Path, seed: int, seconds: float, every_s: float, say: Callable[[str], None]
) -> Soak:
    """Starts everything, loads it, and says how that went."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(running_engine("--kind", kind, *PACE)) for kind in KINDS]
        router = stack.enter_context(running_router(folder, [], *flags(folder, engines)))
        fleet = stack.enter_context(ended(Fleet(router, engines)))
        sampler = Sampler(router)
        before = at_rest(sampler)
        soak = Soak(seconds, before, before)
        load = Load(fleet, seed)
        log = AccessLog(folder / LOG, load.ledger)
        watch = Watch(soak, sampler, log, load)
        asyncio.run(load.run(seconds, lambda: watch.run(every_s, say)))
        soak.kills, soak.continued = load.kills, load.continued
        at_rest(sampler)
        soak.metrics = figures(router)
        with contextlib.suppress(AssertionError):
            eventually(log.is_complete, 2.0)
        soak.ends = load.ledger.check()
        soak.wrong += load.ledger.wrong
        fleet.start_anew()
        soak.after = at_rest(sampler, before)
    judge_counts(soak, load.ledger)
    judge_samples(soak)
    return soak


def flags(folder: Path, engines: list[Engine]) -> list[str]:
    """The router's, with the files that they name."""
    tenants, behind = folder / "tenants.toml", folder / "engines.toml"
    tenants.write_text(TENANTS_FILE)
    table = '[[engine]]\nurl = "{}"\nkv_tokens = {}\n'
    behind.write_text("".join(table.format(engine.url, KV_TOKENS) for engine in engines))
    files = ["--tenants-file", str(tenants), "--engines-file", str(behind)]
    return [*LIMITS, *files, "--trust-tenant-header", "--access-log", str(folder / LOG)]


def at_rest(sampler: Sampler, earlier: Sample | None = None) -> Sample:
    """The router once nothing runs, waits or is connected but this sampler, and it holds no more than earlier.

    Without an earlier sample, than a moment before. Threads of the pool for blocking calls end after 10 idle seconds.
    """
    found = [sampler.take(0)]

    def is_at_rest() -> bool:
        found.append(sampler.take(0))
        before, now = earlier or found[-2], found[-1]
        is_small = now.descriptors <= before.descriptors and now.threads <= before.threads
        is_idle = (now.running, now.waiting, now.connections) == (0, 0, 1)
        return is_small and is_idle and (now.workers, now.engines) == (NUM_WORKERS, len(KINDS))

    with contextlib.suppress(AssertionError):
        eventually(is_at_rest, END_TIMEOUT_S)
    return found[-1]


def judge_counts(soak: Soak, ledger: Ledger) -> None:
    """Whether clients, access log and metrics have seen the same requests."""
    metrics, ends = soak.metrics, soak.ends
    for status in (200, 429):
        counted = sum(
            value
            for series, value in metrics.items()
            if series.startswith("orchestra_http_responses_total{")
            and f'status="{status}"' in series
            and '"/v1/' in series
        )
        logged = ledger.statuses.count(status)
        soak.check(f"{counted:.0f} answers of {status} counted, {logged} logged", counted == logged)
    refused = metrics['orchestra_requests_rejected_total{reason="queue_full"}']
    others = metrics["orchestra_requests_rejected_total"] - refused
    soak.check(f"{refused:.0f} refusals counted", refused == ledger.statuses.count(429))
    soak.check(f"{others:.0f} refusals for other reasons", others == 0)
    # Of those who left early, some were on a worker already and others were not.
    ended_, fewest = metrics["orchestra_requests_finished_total"], ends["whole"] + ends["left"]
    soak.check(
        f"{ended_:.0f} ends counted, {fewest} to {fewest + ends['left_early']} seen",
        fewest <= ended_ <= fewest + ends["left_early"],
    )
    failed = metrics['orchestra_requests_finished_total{reason="error"}']
    soak.check(f"{failed:.0f} requests ended with an error", failed == 0)
    dropped = metrics["orchestra_access_log_dropped_total"]
    soak.check(f"{dropped:.0f} lines of the access log dropped", dropped == 0)
    reloads = metrics['orchestra_config_reloads_total{outcome="applied"}']
    soak.check(f"{reloads:.0f} of {soak.rotations} reloads", reloads == soak.rotations)


def judge_samples(soak: Soak) -> None:
    """Whether the router was busy all the time, and in the end is as it was."""
    before, after = soak.before, soak.after
    share = soak.num_idle / max(len(soak.samples), 1)
    if soak.seconds >= JUDGED_FROM_S:
        soak.check(f"the queue was empty in {share:.0%} of samples", share <= IDLE_SHARE_MAX)
    left = (after.running, after.waiting)
    soak.check(f"{left[0]} run and {left[1]} wait at the end", left == (0, 0))
    soak.check(
        f"{before.descriptors} descriptors before, {after.descriptors} after",
        after.descriptors <= before.descriptors,
    )
    soak.check(
        f"{before.threads} threads before, {after.threads} after", after.threads <= before.threads
    )
    growth = soak.growth
    if growth is not None:
        soak.check(f"memory grew by {growth.mb:.2f} MB", growth.is_flat)

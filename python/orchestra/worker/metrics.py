"""The worker's own metrics page. Built in `run`, so that an import registers nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# From a small model's decode step to a full prefill budget of a large one.
STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# From ranks that only have to meet again to one that loads its weights from far away.
REGROUP_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

# What a step still counts for in the bubble when the next one is finished.
BUBBLE_MEMORY = 1 - 1 / 256


class WorkerMetrics:
    """What the loop measures, and what the agent counts.

    Args:
        read_stats: `Agent.stats`; called when the page is read, from the page's thread.
        block_size: tokens per KV block.
    """

    def __init__(self, read_stats: Callable[[], Mapping[str, Any]], block_size: int) -> None:
        self.registry = CollectorRegistry()
        self._step_seconds = Histogram(
            "orchestra_worker_step_seconds",
            "Time of one step on rank 0, by phase: wait (for work, and planning it), execute, commit.",
            ["phase"],
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self.wait = self._step_seconds.labels("wait")
        self.execute = self._step_seconds.labels("execute")
        self.commit = self._step_seconds.labels("commit")
        self.computed_tokens = Counter(
            "orchestra_worker_computed_tokens_total",
            "Tokens that went through the model, prompts included.",
            registry=self.registry,
        )
        self.sampled_tokens = Counter(
            "orchestra_worker_sampled_tokens_total",
            "Tokens drawn.",
            registry=self.registry,
        )
        self._stages = _StageFigures(self.registry)
        self._repartition_seconds = Histogram(
            "orchestra_worker_repartition_seconds",
            "Time in which no step ran because layers moved between stages, by outcome: moved, refused (they stayed).",
            ["outcome"],
            buckets=REGROUP_BUCKETS,
            registry=self.registry,
        )
        self._regroup_seconds = Histogram(
            "orchestra_worker_regroup_seconds",
            "Time since a lost rank was noticed, until: survivors (the others are ready), all (the worker serves).",
            ["until"],
            buckets=REGROUP_BUCKETS,
            registry=self.registry,
        )
        self._regroups = Counter(
            "orchestra_worker_regroups_total",
            "Times that a lost rank was replaced.",
            registry=self.registry,
        )
        self.registry.register(_AgentCollector(read_stats, block_size))

    def regrouped(self, survivors_s: float, total_s: float) -> None:
        """A lost rank was replaced, seconds after its loss was noticed."""
        self._regroups.inc()
        self._regroup_seconds.labels("survivors").observe(survivors_s)
        self._regroup_seconds.labels("all").observe(total_s)

    def repartitioned(self, outcome: str, seconds: float) -> None:
        """Layers were to move between stages; `outcome` is `moved` or `refused`."""
        self._repartition_seconds.labels(outcome).observe(seconds)

    def note_split(self, split: Sequence[int]) -> None:
        """So many layers each stage has now."""
        self._stages.note_split(split)

    def note_stages(self, busy_s: Sequence[float], alone_s: float) -> None:
        """Counts a finished step of a pipeline; a single stage has no bubble to report.

        Args:
            busy_s: seconds in which each stage computed it.
            alone_s: seconds in which it was in flight and the step before it was not.
        """
        if len(busy_s) > 1:
            self._stages.note(busy_s, alone_s)

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Serves the page on a thread of its own; returns what stops it.

        Raises:
            OSError: the address is taken.
        """
        server, thread = start_http_server(port, host, self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop


class _StageFigures:
    """How the stages of a pipeline spend the time in which the worker has a step in flight."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._in_flight_seconds = Counter(
            "orchestra_worker_pipeline_seconds_total",
            "Seconds in which at least one step was in flight.",
            registry=registry,
        )
        self._busy_seconds = Counter(
            "orchestra_worker_stage_busy_seconds_total",
            "Seconds in which a stage of the pipeline computed.",
            ["stage"],
            registry=registry,
        )
        self._bubble_ratio = Gauge(
            "orchestra_worker_pipeline_bubble_ratio",
            "Share of the time of about the last 256 steps in which a stage waited while some step was in flight.",
            ["stage"],
            registry=registry,
        )
        self._layers = Gauge(
            "orchestra_worker_stage_layers",
            "Layers of a stage of the pipeline, where they can move.",
            ["stage"],
            registry=registry,
        )
        self._recent_s = 0.0
        self._recent_busy_s: dict[int, float] = {}

    def note_split(self, split: Sequence[int]) -> None:
        """See `WorkerMetrics.note_split`."""
        for stage, count in enumerate(split):
            self._layers.labels(str(stage)).set(count)

    def note(self, busy_s: Sequence[float], alone_s: float) -> None:
        """Counts a finished step; see `WorkerMetrics.note_stages`."""
        self._in_flight_seconds.inc(alone_s)
        self._recent_s = BUBBLE_MEMORY * self._recent_s + alone_s
        for stage, seconds in enumerate(busy_s):
            self._busy_seconds.labels(str(stage)).inc(seconds)
            recent = BUBBLE_MEMORY * self._recent_busy_s.get(stage, 0.0) + seconds
            self._recent_busy_s[stage] = recent
            # A stage may have begun before what is counted here: a step or two of the 256.
            bubble = max(0.0, 1 - recent / max(self._recent_s, 1e-9))
            self._bubble_ratio.labels(str(stage)).set(bubble)


class _AgentCollector(Collector):
    """The agent's figures at the moment of reading."""

    def __init__(self, read_stats: Callable[[], Mapping[str, Any]], block_size: int) -> None:
        self._read_stats = read_stats
        self._block_size = block_size

    def collect(self) -> Iterator[Metric]:
        """Yields the figures as metric families."""
        stats = self._read_stats()
        blocks = stats["kv_blocks_total"]
        gauges = {
            "requests_running": ("Sequences that run.", stats["num_running"]),
            "requests_waiting": ("Sequences that wait.", stats["num_waiting"]),
            "kv_cache_usage_ratio": (
                "Share of the KV blocks that running sequences hold.",
                stats["kv_blocks_used"] / max(1, blocks),
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"orchestra_{name}", text, value)
        counters = {
            "preemptions": ("Times a sequence lost its KV blocks.", stats["preemptions"]),
            "swaps": ("Those of them whose KV host memory kept.", stats["swaps"]),
            "prefix_cache_hit_tokens": (
                "Prompt tokens that the prefix cache gave.",
                stats["prefix_hit_tokens"],
            ),
            "kv_blocks_fetched": (
                "KV blocks that came from other workers.",
                stats["kv_blocks_fetched"],
            ),
            "kv_blocks_pushed": (
                "KV blocks written to other workers while they were computed.",
                stats["kv_blocks_pushed"],
            ),
            "kv_host_hit_tokens": (
                "Tokens whose KV was copied back from host memory.",
                stats["host_hit_tokens"],
            ),
            "kv_blocks_written_through": (
                "KV blocks that this worker's keeper has copied.",
                stats["kv_blocks_written_through"],
            ),
            "kv_blocks_kept": (
                "KV blocks copied from other workers to be kept for them.",
                stats["kv_blocks_kept"],
            ),
            "kv_write_throughs_dropped": (
                "Beginnings of sequences that were not written through because too many waited.",
                stats["kv_write_throughs_dropped"],
            ),
            "kv_fetch_failures": (
                "Moves of KV that did not come about.",
                stats["kv_fetch_failures"],
            ),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"orchestra_{name}", text, value)
        info = GaugeMetricFamily(
            "orchestra_cache_config_info",
            "Shape of the cache.",
            labels=["block_size", "num_blocks"],
        )
        info.add_metric([str(self._block_size), str(blocks)], 1)
        yield info

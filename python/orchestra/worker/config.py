"""What one rank is told at start, and the only defaults; `command_line` reads it from flags."""

from dataclasses import dataclass, field
from pathlib import Path

from orchestra.worker.sharding import Shard, Stage

# Tokens of a step. A CPU is as fast with a few hundred as with thousands, and what has few comes first to its end.
STEP_TOKENS = 2048
STEP_TOKENS_CPU = 256


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of one rank."""

    model_dir: Path
    """Checkpoint directory in the Hugging Face layout."""
    router: str
    """The router's worker gateway, `http://host:port`."""
    worker_id: str
    """Stable name of the worker, unique in the cluster."""
    model_name: str
    """Under which clients ask for the model."""
    shard: Shard = field(default_factory=Shard)
    """This rank's place in the tensor-parallel group of its stage."""
    stage: Stage = field(default_factory=Stage)
    """Its stage of the pipeline."""
    repartition: str = "off"
    """Whether layers move between stages while the worker serves: `off`, or `auto`: where that pays."""
    rendezvous: str = ""
    """Where the ranks meet: `file:///path`, `tcp://host:port` or `env://`. Empty with one rank."""
    context: Shard = field(default_factory=Shard)
    """This rank's place among those of its stage that divide the tokens of long prompts."""
    context_min_tokens: int = 128
    """Fewest tokens of prompts in a step that they divide; of a smaller step every one computes the whole."""
    attention: str = "auto"
    """What attends over the cache: `torch`, `cpu`, `triton`, or `auto`: the device's kernels where they can compute."""
    cuda_graphs: str = "auto"
    """Whether decode steps are recorded and replayed: `on`, `off`, or `auto`: on a GPU, where one rank computes."""
    record_steps: str = "auto"
    """Whether a CPU runs steps of few tokens from a recording of their kernels: `off`, or `auto`: where it can."""
    bind_cores: str = "auto"
    """Whether ranks of one machine compute on cores of their own: `off`, or `auto`: on CPUs, where they are enough."""
    async_scheduling: str = "auto"
    """Whether the next step is planned while one runs: `on`, `off`, or `auto`: on a GPU, where one rank computes."""
    overlap_min_tokens: int = 1024
    """Fewest tokens of a step of which one half is computed while the sums of the other are under way; 0: none."""
    collectives: str = "auto"
    """What carries the sums of the ranks: `gloo` or `shm` between CPUs, `nccl` or `nvlink` between GPUs, or `auto`:
    memory that the ranks of a node share, where they can."""
    node: str = ""
    """What this rank's node is called, whose ranks are near each other; empty: by boot and PID namespace."""
    regroup_timeout_s: float = 0.0
    """How long the ranks wait for a replacement of one that was lost; 0: they end with it."""
    rank_hang_timeout_ms: int = 300
    """Shortest time without progress in a step after which a rank is taken for hung; 0: it never is."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, or `auto`: the checkpoint's, where the device computes in it natively."""
    runner: str = "auto"
    """Whose code computes the model: `native`, `hf` (transformers' modules), or `auto`: native where it can."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is some."""
    block_size: int = 16
    """Tokens per KV block, a power of two."""
    num_blocks: int | None = None
    """KV blocks; None: as many as the memory allows."""
    kv_cache_memory: int | None = None
    """Bytes of KV cache per rank; None: a share of the free memory."""
    num_host_blocks: int = 0
    """KV blocks of host memory, of each rank, that keep what preempted sequences have computed, what the prefix cache
    evicts, and copies for other workers."""
    max_num_seqs: int = 256
    """Most sequences in one step."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; None: see `step_tokens`."""
    max_model_len: int | None = None
    """Longest prompt plus output, tokens; None: what the model and the cache can hold."""
    max_prefill_chunk: int = 0
    """Most prompt tokens of one sequence in one step; 0: only the token budget."""
    tpot_target_ms: int = 0
    """How long a step may last while sequences decode; prompts get what is left. 0: no matter how long."""
    enable_prefix_cache: bool = True
    """Whether prompts reuse the KV of equal beginnings."""
    expert_parallel: bool = False
    """Whether each expert lies whole on one rank, instead of a slice of each on every rank."""
    kv_transfer: str = "auto"
    """What moves KV between workers: `auto`, `shm`, `tcp`, or `off`."""
    kv_address: str | None = None
    """Address at which workers of other hosts reach this one's KV; None: only those of this host do."""
    write_through: bool = False
    """Whether another worker is to keep copies of what the prefix cache holds."""
    failure_domain: str = ""
    """What fails together with this worker; empty: its host, by its boot."""
    role: str = "both"
    """What the worker is for: `prefill`, `decode` or `both`."""
    weights_epoch: int = 0
    """Version of the weights."""
    drain_timeout_s: float = 30.0
    """How long running sequences may go on after a signal to stop."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics page."""
    metrics_port: int | None = None
    """Port of the metrics page; None: there is none."""
    parent_pid: int | None = None
    """The process whose end ends this one."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the worker: those of all stages."""
        return self.stage_place.size * self.stage.count

    @property
    def stage_place(self) -> Shard:
        """This rank's number among the ranks of its stage: those that share each layer are neighbours."""
        rank = self.context.rank * self.shard.size + self.shard.rank
        return Shard(rank, self.context.size * self.shard.size)

    @property
    def rank(self) -> int:
        """This rank's number among those of the worker, stage after stage; the agent is rank 0's."""
        return self.stage.index * self.stage_place.size + self.stage_place.rank

    @property
    def sampling_rank(self) -> int:
        """The rank that draws the tokens: the first of the last stage."""
        return self.num_ranks - self.stage_place.size

    def step_tokens(self, device_type: str) -> int:
        """Most tokens in one step on a device of this type (`cpu`, `cuda`): as asked for, or what suits it.

        Every running sequence has to fit, so that each gets a token.
        """
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        usual = STEP_TOKENS_CPU if device_type == "cpu" else STEP_TOKENS
        return max(usual, self.max_num_seqs)

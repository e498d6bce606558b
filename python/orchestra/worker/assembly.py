"""Brings one rank up: meets the other ranks, loads its shard, sizes and allocates the cache."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from orchestra.errors import ConfigError
from orchestra.worker import cores
from orchestra.worker import device as devices
from orchestra.worker.attention import AttentionBackend
from orchestra.worker.attention_choice import make_attention
from orchestra.worker.attention_layout import workspace_bytes
from orchestra.worker.config import WorkerConfig
from orchestra.worker.context_runner import ContextAttention, ContextRunner
from orchestra.worker.decode_graphs import DecodeGraphs
from orchestra.worker.drawn import LatestTokens
from orchestra.worker.graph_choice import attention_name, graph_bytes, make_graphs, uses_graphs
from orchestra.worker.group import Group, join_ranks
from orchestra.worker.kv_cache import (
    GIB,
    KvCache,
    KvCacheBudget,
    KvCacheSpec,
    PagedCache,
    check_host_blocks,
    decide_max_model_len,
    decide_num_blocks,
)
from orchestra.worker.kv_memory import KvMemory, num_scratch_blocks
from orchestra.worker.kv_pool import make_kv_memory
from orchestra.worker.layer_mover import LayerMover, Makers, StageParts
from orchestra.worker.layers import LoadContext
from orchestra.worker.loader import Progress, WeightReader
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.models import LOADERS, Model
from orchestra.worker.models.decoder import Decoder
from orchestra.worker.overlap import HalvedAttention, OverlappedDecoder, may_overlap
from orchestra.worker.plan import PlanReader
from orchestra.worker.plan_channel import CacheTerms
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.recorded_decoder import RECORDED_ROWS, RecordedDecoder, recorded
from orchestra.worker.runner import ModelRunner, RecordedSteps, warm_up_plan
from orchestra.worker.runner_choice import ModelShape, load_hf, read_model_config
from orchestra.worker.sampler import Sampler
from orchestra.worker.sampler_slots import SamplerSlots
from orchestra.worker.scheduling_choice import STEPS_AHEAD, plans_ahead
from orchestra.worker.sharding import Shard, Span, Stage
from orchestra.worker.stage_cache import StageCache

if TYPE_CHECKING:
    from orchestra._core import KvPool
    from orchestra.worker.hf_config import HfConfig

# Share of the free memory that the KV cache takes where nothing was asked for. A CPU's memory serves others too.
CUDA_SHARE = 0.9
CPU_SHARE = 0.25

# What libraries take for themselves when their kernels first run.
LIBRARY_BYTES = 32 << 20


@dataclass(frozen=True)
class Place:
    """Where a rank computes, and in which numbers."""

    device: torch.device
    dtype: torch.dtype
    local_size: int
    """Ranks on this machine, which share its cores and its memory."""
    cores: tuple[int, ...] = ()
    """Where it computes; none: anywhere."""


@dataclass
class Rank:
    """One rank, ready to execute plans."""

    model_config: ModelShape
    runner: ModelRunner
    """Another one after layers have moved."""
    reader: PlanReader
    """Reads the messages with this rank's plans."""
    group: Group
    num_blocks: int
    """KV blocks, the same on every rank."""
    max_model_len: int
    """Longest sequence that fits, tokens."""
    step_tokens: int
    """Most tokens in one step."""
    kv_memory: KvMemory | None = None
    """The cache's memory, where KV can move to other workers and come from them."""
    block_size: int = 1
    """Tokens per KV block."""

    stage: Stage = field(default_factory=Stage)
    """Its stage of the pipeline."""
    place: Shard = field(default_factory=Shard)
    """Its number among the ranks of its stage."""
    mover: LayerMover | None = None
    """Where layers can move between stages."""
    plans_ahead: bool = False
    """Whether its steps are planned before the tokens of the one before are known."""
    cores: tuple[int, ...] = ()
    """Of this machine, where it computes; none: anywhere."""

    @property
    def kv_pool(self) -> "KvPool | None":
        """What moves that memory's blocks; rank 0 has it."""
        return None if self.kv_memory is None else self.kv_memory.pool

    @property
    def shares_cache(self) -> bool:
        """Whether other workers reach the caches of several ranks, through rank 0."""
        return self.kv_memory is not None and self.kv_memory.shard.size > 1

    @property
    def cache_terms(self) -> CacheTerms:
        """What a replacement of another rank has to know of the caches."""
        address = "" if self.kv_pool is None else self.kv_pool.address
        return CacheTerms(self.num_blocks, address)

    @property
    def steps_in_flight(self) -> int:
        """Most steps that are planned and not committed."""
        return STEPS_AHEAD if self.plans_ahead else self.stage.count

    @property
    def reporting_ranks(self) -> list[int]:
        """The first rank of each stage but the first stage: those that report to rank 0."""
        return [stage * self.place.size for stage in range(1, self.stage.count)]

    @property
    def sampling_rank(self) -> int:
        """The one that draws the tokens: the first rank of the last stage."""
        return (self.stage.count - 1) * self.place.size

    @property
    def is_reporting(self) -> bool:
        """Whether rank 0 waits for this rank's reports."""
        return self.place.rank == 0 and not self.stage.is_first

    def settle(self) -> None:
        """Begins a generation together with the other ranks: those that stayed, and those that have just loaded.

        Raises:
            RankLostError: another rank of the group is gone, or has other room for KV than there was.
        """
        num_blocks = self.group.agree_on_least(self.num_blocks)
        if num_blocks != self.num_blocks:
            raise RankLostError(f"a rank has room for {num_blocks} blocks, not {self.num_blocks}")
        self.warm_up()

    def warm_up(self) -> None:
        """Runs a step of each kind for nobody, together with the other ranks."""
        # Behind the blocks of sequences, where other workers may be reading any of those.
        block = self.num_blocks if self.shares_cache else 0
        warm_up(self.runner, self.block_size, block)


def assemble(config: WorkerConfig, progress: Progress) -> Rank:
    """Brings this rank up, with the others of its group.

    Args:
        config: what was asked for.
        progress: told as parts of the weights are loaded.

    Raises:
        ConfigError: a setting, or a file of the checkpoint, is wrong.
        UnsupportedError: the model needs something that the worker does not have.
        RankLostError: another rank of the group is gone.
    """
    # First what needs no other rank: an error here ends every rank of the group by itself.
    model_config = read_model_config(config)
    _longest_sequence(config, model_config)
    place = _choose_place(config, model_config)
    _check_weights_fit(config, model_config, place)
    if config.repartition != "off" and place.device.type != "cpu":
        message = "--repartition: stages are timed on CPUs only, where they end when the work does"
        raise ConfigError(message, key="repartition")
    return build_rank(config, model_config, place, join_ranks(config, place.device), progress)


def warm_up(runner: ModelRunner, block_size: int, block: int = 0) -> None:
    """Runs a step of each kind, on all ranks together, and records those that are to be replayed.

    Args:
        runner: this rank's.
        block_size: tokens of a block.
        block: where the steps leave their KV, for nobody.
    """
    runner.forget()
    for num_tokens in (block_size, 1):
        runner.execute(warm_up_plan(num_tokens, block, block_size))
    if isinstance(runner.recorded, DecodeGraphs):
        runner.recorded.record()


def build_rank(
    config: WorkerConfig,
    model_config: "ModelConfig | HfConfig",
    place: Place,
    group: Group,
    progress: Progress,
) -> Rank:
    """Loads and allocates what one rank of a joined group needs; raises as `assemble` does."""
    longest = _longest_sequence(config, model_config)
    model, shape = _load(config, model_config, place, group, progress)
    heads = config.shard.heads(shape.num_heads, shape.num_kv_heads)
    layers = config.stage.layers(shape.num_layers)
    spec = KvCacheSpec(
        num_layers=len(layers),
        num_kv_heads=len(heads.kv_heads),
        head_dim=shape.head_dim,
        block_size=config.block_size,
        dtype=place.dtype,
        key_order=shape.key_order,
    )
    budget = _budget(config, shape, spec, place, longest)
    is_recorded = uses_graphs(config, model_config, spec, place.device)
    if is_recorded:
        taken = graph_bytes(config, shape, -(-longest // config.block_size))
        budget = replace(budget, free_bytes=max(0, budget.free_bytes - taken))
    if group.terms.num_blocks > 0:
        # This rank replaces one: the others have their caches.
        budget = replace(budget, num_blocks=group.terms.num_blocks)
    num_blocks = group.agree_on_least(decide_num_blocks(spec, budget))
    max_model_len = decide_max_model_len(spec, num_blocks, config.max_model_len, longest)
    left = budget.free_bytes - num_blocks * spec.bytes_per_block
    check_host_blocks(spec, config.num_host_blocks, _free_host_bytes(place, left))
    memory = make_kv_memory(config, spec, num_blocks, place.device, group)
    num_scratch = 0 if memory is None else memory.num_scratch_blocks
    is_ahead = plans_ahead(config, place.device, moves_kv=memory is not None)
    name = attention_name(config, model_config, place.device)
    # One for all runners: another one comes when layers move, and goes on with the same sequences.
    slots = _make_slots(config, shape, place, group, is_ahead=is_ahead)

    def make_runner(model: Model, cache: PagedCache, layers: Span) -> ModelRunner:
        rules = shape.attention[layers.start : layers.stop]

        def attend() -> AttentionBackend:
            return make_attention(name, cache, len(heads.heads), place.device, rules)

        attention = attend()
        steps: RecordedSteps | None = None
        if is_recorded:
            steps = make_graphs(config, model, attention, max_model_len, place.device)
        if group.context is None:
            usual = recorded(model, attention) if config.record_steps == "auto" else model
            steps = usual if isinstance(usual, RecordedDecoder) else steps
            if isinstance(model, Decoder) and may_overlap(config):
                halves, min_tokens = (attention, attend()), config.overlap_min_tokens
                attention = HalvedAttention(halves, group.communicator, min_tokens)
                usual = OverlappedDecoder(model, usual, attention, group.communicator)
            return ModelRunner(usual, cache, attention, slots, place.device, steps)
        division = ContextAttention(
            *(attention, cache, group.context, config.context, config.context_min_tokens),
            group.experts,
        )
        return ContextRunner(model, cache, division, slots, place.device)

    mover = None
    if config.repartition == "off":
        num_all, num_host = num_blocks + num_scratch, config.num_host_blocks
        cache = KvCache(spec, num_all, place.device, num_host, memory)
        runner = make_runner(model, cache, layers)
    else:
        layered = StageCache.allocate(spec, num_blocks, config.num_host_blocks)
        mover = _make_mover(config, (model, layered), make_runner, place, group)
        runner = mover.runner
    plans = PlanReader(config.max_num_seqs, -(-max_model_len // config.block_size))
    rank = Rank(
        *(shape, runner, plans, group, num_blocks, max_model_len),
        step_tokens=config.step_tokens(place.device.type),
        kv_memory=memory,
        stage=config.stage,
        place=config.stage_place,
        block_size=config.block_size,
        mover=mover,
        plans_ahead=is_ahead,
        cores=place.cores,
    )
    rank.warm_up()
    return rank


def _make_slots(
    config: WorkerConfig, shape: ModelShape, place: Place, group: Group, *, is_ahead: bool
) -> SamplerSlots:
    latest = sampler = None
    if is_ahead:
        latest = LatestTokens(config.max_num_seqs, place.device, group.communicator)
    if config.rank == config.sampling_rank:
        sampler = Sampler(shape.vocab_size, config.max_num_seqs, place.device, latest)
    return SamplerSlots(sampler, latest)


def _make_mover(
    config: WorkerConfig,
    loaded: tuple[Model, StageCache],
    make_runner: Callable[[Model, PagedCache, Span], ModelRunner],
    place: Place,
    group: Group,
) -> LayerMover:
    """What moves the layers of a rank whose model and cache are `loaded`."""
    decoder, cache = loaded
    # Other runners than the native one refuse stages.
    assert isinstance(decoder, Decoder)
    assert group.courier is not None
    makers = Makers(
        reader=lambda: WeightReader(config.model_dir),
        context=lambda reader, stage: _load_context(
            replace(config, stage=stage), place, group, reader
        ),
        runner=lambda decoder, cache: make_runner(decoder, cache, decoder.span),
    )
    parts = StageParts(decoder, cache, makers.runner(decoder, cache))
    model_config = decoder.config
    return LayerMover(model_config, config.stage, parts, makers, group.courier, place.local_size)


def _load(
    config: WorkerConfig,
    model_config: "ModelConfig | HfConfig",
    place: Place,
    group: Group,
    progress: Progress,
) -> tuple[Model, ModelShape]:
    """Loads this rank's part by the runner that was chosen."""
    longest = _longest_sequence(config, model_config)
    if not isinstance(model_config, ModelConfig):
        return load_hf(config, model_config, place.dtype, place.device, longest, progress)
    with WeightReader(config.model_dir) as reader:
        context = _load_context(config, place, group, reader)
        load = LOADERS[model_config.architecture]
        return load(context, model_config, longest, progress), model_config


def _load_context(
    config: WorkerConfig, place: Place, group: Group, reader: WeightReader
) -> LoadContext:
    return LoadContext(
        reader,
        group.communicator,
        place.dtype,
        place.device,
        config.expert_parallel,
        group.experts,
        config.stage,
        group.link,
    )


def _longest_sequence(config: WorkerConfig, model_config: "ModelConfig | HfConfig") -> int:
    """Tokens of the longest sequence that may ever run."""
    longest = model_config.max_position_embeddings
    asked = config.max_model_len
    if asked is not None and asked > longest:
        message = f"--max-model-len: {asked} is more than the model's {longest} positions"
        raise ConfigError(message, key="max_model_len")
    return longest if asked is None else asked


def _choose_place(config: WorkerConfig, model_config: "ModelConfig | HfConfig") -> Place:
    # torchrun sets both; without it, the ranks of a group share this machine.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", config.num_ranks))
    local_rank = int(os.environ.get("LOCAL_RANK", config.rank))
    device = devices.select_device(config.device, local_rank)
    devices.set_threads(local_size)
    by_torch = not isinstance(model_config, ModelConfig)
    dtype = devices.select_dtype(config.dtype, model_config.dtype, device, by_torch=by_torch)
    is_bound = config.bind_cores == "auto" and device.type == "cpu"
    own = cores.share_of(local_rank, local_size) if is_bound else ()
    return Place(device, dtype, local_size, own)


def _check_weights_fit(
    config: WorkerConfig, model_config: "ModelConfig | HfConfig", place: Place
) -> None:
    """Compares the weights with the free memory before they are read, which may otherwise end in a kill."""
    size = sum(path.stat().st_size for path in config.model_dir.glob("*.safetensors"))
    weights = size * place.dtype.itemsize // model_config.dtype.itemsize
    weights -= _num_weights_elsewhere(config, model_config) * place.dtype.itemsize
    weights //= config.shard.size
    if place.device.type == "cpu":
        # The largest of them, beside its copy as the kernels want it; with tied embeddings both stay.
        head = model_config.vocab_size * model_config.hidden_size
        weights += head * place.dtype.itemsize // config.shard.size
    needed = weights + LIBRARY_BYTES
    free = devices.free_bytes(place.device, place.local_size)
    if needed > free:
        message = (
            f"model_dir: to load it takes {needed / GIB:.2f} GiB, but {free / GIB:.2f} GiB are free"
        )
        raise ConfigError(message, key="model_dir")


def _num_weights_elsewhere(config: WorkerConfig, model_config: "ModelConfig | HfConfig") -> int:
    """Of the experts that ranks with the same shard have between them, those that this rank does not have."""
    if not config.expert_parallel or not isinstance(model_config, ModelConfig):
        return 0
    experts = model_config.experts
    if experts is None:
        return 0
    # Their layers may lie on other stages, and are counted all the same.
    layers = sum(experts.is_in(layer) for layer in range(model_config.num_layers))
    of_one = 3 * model_config.hidden_size * experts.intermediate_size
    return layers * (experts.count - len(config.context.span(experts.count))) * of_one


def _budget(
    config: WorkerConfig, shape: ModelShape, spec: KvCacheSpec, place: Place, longest: int
) -> KvCacheBudget:
    is_cuda = place.device.type == "cuda"
    free = devices.free_bytes(place.device, place.local_size)
    taken = step_bytes(config, shape, spec, longest, place.device.type)
    taken += num_scratch_blocks(config.shard) * spec.bytes_per_block
    return KvCacheBudget(
        num_blocks=config.num_blocks,
        memory_bytes=config.kv_cache_memory,
        free_bytes=max(0, free - taken),
        useful_tokens=None if is_cuda else config.max_num_seqs * longest,
        share=CUDA_SHARE if is_cuda else CPU_SHARE,
    )


def _free_host_bytes(place: Place, left: int) -> int:
    """Host memory for swapped blocks: on a CPU what is `left` beside blocks and steps, else all that is free."""
    is_cpu = place.device.type == "cpu"
    return left if is_cpu else devices.free_bytes(torch.device("cpu"), place.local_size)


def step_bytes(
    config: WorkerConfig, shape: ModelShape, spec: KvCacheSpec, longest: int, device_type: str
) -> int:
    """Upper estimate of what a step needs beside weights and cache."""
    # Live at once per token: the residual stream and its copies, both halves of the MLP, the attention heads. Per
    # sample, while it is drawn: the logits, what penalties and biases make of them, which tokens came before, the
    # probabilities, ranked and summed up in double precision. All counted as fp32.
    heads = 3 * shape.num_heads * shape.head_dim
    if config.context.size > 1:
        # The keys and values of a layer, this rank's and everyone's.
        heads += 4 * spec.num_kv_heads * spec.head_dim
        if config.expert_parallel and isinstance(shape, ModelConfig) and shape.experts is not None:
            # The rows of its picks: sent, everyone's, computed, everyone's again, and in order.
            heads += (3 + 2 * config.context.size) * shape.experts.per_token * shape.hidden_size
    per_token = 4 * shape.hidden_size + 3 * shape.mlp_width + heads
    per_sample = 16 * shape.vocab_size
    numbers = config.step_tokens(device_type) * per_token + config.max_num_seqs * per_sample
    if device_type == "cpu":
        # What recorded steps keep for good.
        numbers += RECORDED_ROWS * (per_token + shape.vocab_size)
    num_layouts = 2 if may_overlap(config) else 1
    attention = workspace_bytes(spec, config.max_num_seqs, longest, num_layouts)
    return numbers * torch.float32.itemsize + attention + LIBRARY_BYTES

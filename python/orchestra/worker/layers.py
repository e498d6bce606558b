"""The layers that model files are built from, each holding only its rank's part of the weights.

A layer's `load` reads its slices from the checkpoint; calling the layer computes. Layers are plain objects: a call of
`nn.Module` costs as much as a small kernel, and a decode step makes a hundred of them.

Shapes: `T` tokens of a step, `H` hidden size; weights are `[out, in]` as in the checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra.worker import recording, row_kernels
from orchestra.worker.linear import make_linear
from orchestra.worker.loader import WeightReader, empty_weight
from orchestra.worker.logits import Logits, SharedLogits, WholeLogits
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.parallel import Communicator
from orchestra.worker.sharding import Span, Stage
from orchestra.worker.stage_link import SingleStage, StageLink

if TYPE_CHECKING:
    from orchestra.worker.expert_exchange import ExpertGroup

Op = Callable[[Tensor], Tensor]

# By their names in `config.json`.
ACTIVATIONS: dict[str, Op] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class LoadContext:
    """What every layer needs in order to load its part."""

    reader: WeightReader
    communicator: Communicator
    dtype: torch.dtype
    device: torch.device
    expert_parallel: bool = False
    """Whether each expert is loaded whole, by one rank."""
    expert_group: "ExpertGroup | None" = None
    """The ranks that have this shard's experts between them."""
    stage: Stage = field(default_factory=Stage)
    """Which layers are loaded."""
    link: StageLink = field(default_factory=SingleStage)
    """Where hidden states come from and go to."""

    def cache_index(self, layer: int, config: ModelConfig) -> int:
        """Where a layer of the model lies in this rank's KV cache."""
        return layer - self.stage.layers(config.num_layers).start

    def rows(self, name: str, shape: Sequence[int], runs: Sequence[Span] | None = None) -> Tensor:
        """Loads runs of rows of a weight (all of them by default); see `WeightReader.copy_rows`."""
        runs = [Span(0, shape[0])] if runs is None else runs
        target = empty_weight([sum(map(len, runs)), *shape[1:]], self.dtype, self.device)
        self.reader.copy_rows(name, shape, runs, target)
        return target

    def stacked_rows(self, parts: Sequence[tuple[str, Sequence[int], Sequence[Span]]]) -> Tensor:
        """Loads rows of several weights into one, below each other; each part is `(name, shape, runs)`."""
        lengths = [sum(map(len, runs)) for _, _, runs in parts]
        target = empty_weight([sum(lengths), *parts[0][1][1:]], self.dtype, self.device)
        for (name, shape, runs), piece in zip(parts, torch.split(target, lengths), strict=True):
            self.reader.copy_rows(name, shape, runs, piece)
        return target


class RMSNorm:
    """Divides by the root mean square over the last dimension, then multiplies by a weight.

    Args:
        weight: as the checkpoint has it.
        config: of the model: what is added to the mean of the squares, and to the weight.
    """

    def __init__(self, weight: Tensor, config: ModelConfig) -> None:
        # y = x / sqrt(sum(x²) / n + eps) * w  =  x / hypot(norm(x), sqrt(n * eps)) * (w * sqrt(n)):
        # four small kernels. torch.rms_norm takes nine on the CPU, and twice the time.
        # On a CPU one kernel of ours does it all, and the sum before it.
        size = weight.shape[-1]
        self._epsilon = config.rms_norm_eps
        self._plain_weight = (weight.float() + config.norm_offset).contiguous()
        self._floor = torch.tensor(math.sqrt(size * config.rms_norm_eps), device=weight.device)
        self._weight = self._plain_weight * math.sqrt(size)

    @classmethod
    def load(cls, context: LoadContext, name: str, size: int, config: ModelConfig) -> "RMSNorm":
        """Loads `name` + `.weight`, whole on every rank."""
        return cls(context.rows(f"{name}.weight", [size]), config)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises `[T, size]`, or `[T, heads, size]`; the statistics are fp32 whatever the dtype of `x`."""
        if self._suits(x):
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            row_kernels.rms_norm(x, self._plain_weight, self._epsilon, out=y)
            return y
        norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        y = torch.div(x, torch.hypot(norm, self._floor)).mul_(self._weight)
        return y if x.dtype is torch.float32 else y.to(x.dtype)

    def after_sum(self, x: Tensor, addend: Tensor) -> Tensor:
        """Adds to `x`, `[T, size]`, in place, and normalises the sum."""
        if self._suits(x) and addend.is_contiguous():
            y = torch.empty_like(x)
            row_kernels.rms_norm(x, self._plain_weight, self._epsilon, addend=addend, out=y)
            return y
        return self(x.add_(addend))

    def in_place(self, x: Tensor) -> None:
        """Normalises `[T, heads, size]` where it lies."""
        if self._suits(x):
            row_kernels.rms_norm(x, self._plain_weight, self._epsilon, out=x)
        else:
            x.copy_(self(x))

    def _suits(self, x: Tensor) -> bool:
        return row_kernels.supports(x) and (x.dim() == 2 or row_kernels.has_whole_heads(x))


def load_row_parallel(
    context: LoadContext, name: str, shape: Sequence[int], columns: Span, *, bias: bool
) -> Op:
    """Loads `columns` of `name`: a linear layer whose input is spread over the ranks.

    Returns:
        What maps this rank's `[T, columns]` to its part of `[T, out]`, which is the sum over the ranks.
    """
    weight = empty_weight([shape[0], len(columns)], context.dtype, context.device)
    context.reader.copy_columns(f"{name}.weight", shape, columns, weight)
    vector = context.rows(f"{name}.bias", shape[:1]) if bias else None
    # The bias is rank 0's, so that it is added once.
    return make_linear(weight, vector if context.communicator.shard.rank == 0 else None)


class GatedMLP:
    """`down(act(gate(x)) * up(x))`, the intermediate dimension spread over the ranks.

    Args:
        gate_up: maps `[T, H]` to this rank's gates and values side by side.
        down: maps this rank's `[T, width]` to its part of `[T, H]`.
        activation: applied to the gates; one of `ACTIVATIONS`.
    """

    def __init__(self, gate_up: Op, down: Op, activation: str) -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    @classmethod
    def load(cls, context: LoadContext, name: str, config: ModelConfig) -> "GatedMLP":
        """Loads `name` + `.gate_proj`, `.up_proj` (or both as `.gate_up_proj`) and `.down_proj`."""
        hidden, intermediate = config.hidden_size, config.intermediate_size
        span = context.communicator.shard.span(intermediate)

        def stacked(kind: str, rest: list[int]) -> Tensor:
            if config.has_joined_projections:
                runs = [span, span.after(intermediate)]
                return context.rows(f"{name}.gate_up_proj.{kind}", [2 * intermediate, *rest], runs)
            names = (f"{name}.gate_proj.{kind}", f"{name}.up_proj.{kind}")
            return context.stacked_rows([(part, [intermediate, *rest], [span]) for part in names])

        weight = stacked("weight", [hidden])
        vector = stacked("bias", []) if config.mlp_bias else None
        down = load_row_parallel(
            context, f"{name}.down_proj", [hidden, intermediate], span, bias=config.mlp_bias
        )
        return cls(make_linear(weight, vector), down, config.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[T, H]` to this rank's part of `[T, H]`, which is the sum over the ranks."""
        gate_up = self._gate_up(x)
        if row_kernels.supports(gate_up):
            return self._down(row_kernels.gate(gate_up, self._activation))
        gate, value = gate_up.chunk(2, dim=1)
        return self._down(ACTIVATIONS[self._activation](gate).mul_(value))


class VocabEmbedding:
    """Token embeddings, the vocabulary spread over the ranks.

    Args:
        weight: `[rows, H]`, this rank's rows and padding below them.
        span: the token ids of the real rows.
        communicator: joins the ranks.
        scale: multiplies the embeddings; None: they are taken as they are.
    """

    def __init__(
        self, weight: Tensor, span: Span, communicator: Communicator, scale: float | None
    ) -> None:
        self.weight = weight
        # Rounded to the model's own numbers, as it was when the model was trained.
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=weight.dtype))
        self._span = span
        self._communicator = communicator

    @classmethod
    def load(cls, context: LoadContext, name: str, config: ModelConfig) -> "VocabEmbedding":
        """Loads this rank's rows of `name`."""
        span = context.communicator.shard.padded_span(config.vocab_size)
        weight = load_vocab_rows(context, name, config.vocab_size, config.hidden_size)
        return cls(weight, span, context.communicator, config.embedding_scale)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Maps `[T]` ids to `[T, H]`."""
        is_shared = self._communicator.shard.size > 1
        rows = self.weight[: len(self._span)]
        if row_kernels.can_look_up(rows, token_ids):
            embedded = row_kernels.look_up(
                rows, token_ids, first=self._span.start, scale=self._scale
            )
        else:
            embedded = (
                self._look_up(token_ids) if is_shared else F.embedding(token_ids, self.weight)
            )
            embedded = embedded if self._scale is None else embedded.mul_(self._scale)
        if is_shared:
            recording.all_reduce(self._communicator, embedded)
        return embedded

    def _look_up(self, token_ids: Tensor) -> Tensor:
        """This rank's rows, and zeros for those of other ranks."""
        is_elsewhere = (token_ids < self._span.start) | (token_ids >= self._span.stop)
        rows = (token_ids - self._span.start).masked_fill_(is_elsewhere, 0)
        return F.embedding(rows, self.weight).masked_fill_(is_elsewhere.unsqueeze(-1), 0.0)


class VocabHead:
    """Logits, the vocabulary spread over the ranks.

    Args:
        weight: `[rows, H]`, this rank's rows and padding below them.
        vocab: size of the vocabulary.
        communicator: joins the ranks.
        soft_cap: bends every logit `x` to `cap · tanh(x / cap)`; None: not bent.
    """

    def __init__(
        self, weight: Tensor, vocab: int, communicator: Communicator, soft_cap: float | None
    ) -> None:
        self._soft_cap = soft_cap
        self._linear = make_linear(weight, None)
        self._vocab = vocab
        self._communicator = communicator

    def project(self, hidden: Tensor) -> Tensor:
        """Maps `[N, H]` to this rank's columns, `[N, rows]`."""
        return self._linear(hidden)

    def logits(self, part: Tensor) -> Logits:
        """The logits that these columns are this rank's part of."""
        if self._soft_cap is not None:
            part.div_(self._soft_cap).tanh_().mul_(self._soft_cap)
        if self._communicator.shard.size == 1:
            return WholeLogits(part)
        return SharedLogits(part, self._vocab, self._communicator)


def load_vocab_rows(context: LoadContext, name: str, vocab: int, hidden: int) -> Tensor:
    """Loads this rank's rows of a `[vocab, hidden]` weight, padded to equal length with zeros."""
    shard = context.communicator.shard
    span = shard.padded_span(vocab)
    weight = empty_weight([shard.padded_rows(vocab), hidden], context.dtype, context.device)
    context.reader.copy_rows(name, [vocab, hidden], [span], weight[: len(span)])
    weight[len(span) :].zero_()
    return weight

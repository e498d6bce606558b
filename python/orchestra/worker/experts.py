"""Mixture of experts: a router sends each token to a few small MLPs, and their weighted sum takes the MLP's place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra.worker.layers import ACTIVATIONS, GatedMLP, LoadContext, Op
from orchestra.worker.linear import make_linear
from orchestra.worker.loader import empty_weight
from orchestra.worker.model_config import ExpertConfig, ModelConfig
from orchestra.worker.parallel import Communicator


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the three weights of an expert."""

    gate: str
    up: str
    down: str


class SparseMLP:
    """The router and, of every expert, this rank's share of the intermediate dimension.

    No expert has a limit of tokens, so none is ever dropped.

    Args:
        router: `[experts, H]`, whole on every rank: all ranks make the same choice.
        experts: maps `[n, H]` to this rank's part of the sum over the ranks, for each expert.
        config: how many experts a token goes to, and how they are weighted.
        communicator: joins the ranks.
    """

    def __init__(
        self,
        router: Tensor,
        experts: Sequence[Op],
        config: ExpertConfig,
        communicator: Communicator,
    ) -> None:
        self._router = router
        self._experts = experts
        self._config = config
        self._communicator = communicator

    @classmethod
    def load(
        cls, context: LoadContext, name: str, config: ModelConfig, names: ExpertNames
    ) -> "SparseMLP":
        """Loads `name` + `.gate` and `.experts.<index>`."""
        experts = config.experts
        assert experts is not None
        router = context.rows(f"{name}.gate.weight", [experts.count, config.hidden_size])
        loaded = [
            _load_expert(context, f"{name}.experts.{index}", config, names)
            for index in range(experts.count)
        ]
        return cls(router, loaded, experts, context.communicator)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[T, H]` to `[T, H]`."""
        weights, chosen = self._route(x)
        tokens, picks = chosen.shape
        # All pairs of token and pick, sorted by expert: what one expert computes is one run of rows.
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self._experts)).tolist()
        runs = torch.split(x.index_select(0, order // picks), counts)
        parts = [expert(run) for expert, run in zip(self._experts, runs, strict=True) if len(run)]
        # Back in the order of the tokens before they are added up, so that no sum depends on who else is in the batch.
        outputs = x.new_empty(tokens * picks, x.shape[1])
        outputs.index_copy_(0, order, torch.cat(parts))
        y = torch.bmm(weights.unsqueeze(1), outputs.view(tokens, picks, -1)).squeeze(1)
        if self._communicator.shard.size > 1:
            self._communicator.all_reduce(y)
        return y

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (in the numbers of `x`) and indices of each token's experts, both `[T, picks]`."""
        probabilities = F.linear(x, self._router).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self._config.per_token, dim=-1)
        if self._config.is_normalised:
            weights /= weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen


def _load_expert(
    context: LoadContext, name: str, config: ModelConfig, names: ExpertNames
) -> GatedMLP:
    """One expert without the sum over the ranks, which all experts share."""
    assert config.experts is not None
    hidden, intermediate = config.hidden_size, config.experts.intermediate_size
    span = context.communicator.shard.span(intermediate)
    shape = [intermediate, hidden]
    gate_up = context.stacked_rows(
        [(f"{name}.{part}.weight", shape, [span]) for part in (names.gate, names.up)]
    )
    down = empty_weight([hidden, len(span)], context.dtype, context.device)
    context.reader.copy_columns(f"{name}.{names.down}.weight", [hidden, intermediate], span, down)
    activation = ACTIVATIONS[config.activation]
    return GatedMLP(make_linear(gate_up, None), make_linear(down, None), len(span), activation)

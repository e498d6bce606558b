"""Which experts a token goes to, and with what weights."""

import torch
from torch import Tensor

from orchestra.worker.expert_config import ExpertConfig
from orchestra.worker.layers import LoadContext
from orchestra.worker.linear import make_linear
from orchestra.worker.sharding import Span


class ExpertRouter:
    """Scores, choice and weights, all in fp32: experts are often nearly equal.

    Args:
        weight: `float32[experts, H]`, whole on every rank: all ranks make the same choice.
        bias: `float32[experts]`, added to the scores for the choice; None: nothing is.
        config: how to choose and how to weigh.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, config: ExpertConfig) -> None:
        self.config = config
        self._linear = make_linear(weight, None)
        self._bias = bias

    @classmethod
    def load(
        cls, context: LoadContext, name: str, hidden: int, config: ExpertConfig
    ) -> "ExpertRouter":
        """Loads `name` + `.weight` and, where the model has it, `.e_score_correction_bias`."""

        def whole(part: str, shape: list[int]) -> Tensor:
            target = torch.empty(shape, dtype=torch.float32, device=context.device)
            context.reader.copy_rows(f"{name}.{part}", shape, [Span(0, shape[0])], target)
            return target

        bias = whole("e_score_correction_bias", [config.count]) if config.has_choice_bias else None
        return cls(whole("weight", [config.count, hidden]), bias, config)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (in the numbers of `x`) and numbers of each token's experts, both `[T, per_token]`."""
        logits = self._linear(x.float())
        scores = _sigmoid(logits) if self.config.is_sigmoid else logits.softmax(-1)
        for_choice = scores if self._bias is None else scores + self._bias
        if self.config.num_groups > 1:
            for_choice = self._keep_best_groups(for_choice)
        chosen = for_choice.topk(self.config.per_token, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.config.is_normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * self.config.scale).to(x.dtype), chosen

    def _keep_best_groups(self, scores: Tensor) -> Tensor:
        """Minus infinity for the experts of all but the best groups."""
        grouped = scores.view(len(scores), self.config.num_groups, -1)
        # With a bias a group is as good as its two best experts together (DeepSeek-V3), without as its best (V2).
        best = 1 if self._bias is None else 2
        worth = grouped.topk(best, dim=-1).values.sum(-1)
        kept = worth.topk(self.config.groups_per_token, dim=-1).indices
        is_out = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, value=False)
        return grouped.masked_fill(is_out.unsqueeze(-1), float("-inf")).flatten(1)


def _sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + e^-x)`, as a softmax over `x` and 0: each number for itself.

    The last bit of `torch.sigmoid` on the CPU depends on where in the tensor a number stands: it computes whole vectors
    in one way, and what is left in another.
    """
    return torch.stack([x, torch.zeros_like(x)], dim=-1).softmax(-1)[..., 0]

"""Which experts a token goes to, and with what weights. All in fp32: experts are often nearly equal."""

from collections.abc import Callable

import torch
from torch import Tensor

from orchestra import _core
from orchestra.worker.expert_config import ExpertConfig
from orchestra.worker.layers import LoadContext
from orchestra.worker.linear import CpuLinear, make_linear
from orchestra.worker.row_kernels import KERNEL_DTYPES
from orchestra.worker.sharding import Span

Router = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps `[T, H]` to the weights (`float32`) and numbers of each token's experts, both `[T, per_token]`."""


def load_router(context: LoadContext, name: str, hidden: int, config: ExpertConfig) -> Router:
    """Loads `name` + `.weight` and, where the model has it, `.e_score_correction_bias`."""

    def whole(part: str, shape: list[int]) -> Tensor:
        target = torch.empty(shape, dtype=torch.float32, device=context.device)
        context.reader.copy_rows(f"{name}.{part}", shape, [Span(0, shape[0])], target)
        return target

    bias = whole("e_score_correction_bias", [config.count]) if config.has_choice_bias else None
    weight = whole("weight", [config.count, hidden])
    if context.device.type == "cpu" and context.dtype in KERNEL_DTYPES:
        return CpuExpertRouter(weight, bias, config)
    return ExpertRouter(weight, bias, config)


class CpuExpertRouter:
    """One call of a Rust kernel; arguments as those of `ExpertRouter`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, config: ExpertConfig) -> None:
        self._picks = config.per_token
        self._kernel = _core.ExpertRouter(
            CpuLinear(weight, None).kernel,
            None if bias is None else bias.data_ptr(),
            config.per_token,
            is_sigmoid=config.is_sigmoid,
            groups=(config.num_groups, config.groups_per_token),
            is_normalised=config.is_normalised,
            scale=config.scale,
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Router`."""
        tokens = x.shape[0]
        weights = x.new_empty(tokens, self._picks, dtype=torch.float32)
        chosen = x.new_empty(tokens, self._picks, dtype=torch.int32)
        self._kernel.forward(
            *(KERNEL_DTYPES[x.dtype], tokens, (x.data_ptr(), x.stride(0))),
            *(weights.data_ptr(), chosen.data_ptr(), torch.get_num_threads()),
        )
        return weights, chosen


class ExpertRouter:
    """The same in torch's own operations, on any device; none of them waits for it.

    Args:
        weight: `float32[experts, H]`, whole on every rank: all ranks make the same choice.
        bias: `float32[experts]`, added to the scores for the choice; None: nothing is.
        config: how to choose and how to weigh.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, config: ExpertConfig) -> None:
        self.config = config
        self._linear = make_linear(weight, None)
        self._bias = bias

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Router`."""
        logits = self._linear(x.float())
        scores = _sigmoid(logits) if self.config.is_sigmoid else logits.softmax(-1)
        for_choice = scores if self._bias is None else scores + self._bias
        if self.config.num_groups > 1:
            for_choice = self._keep_best_groups(for_choice)
        chosen = for_choice.topk(self.config.per_token, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.config.is_normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.config.scale, chosen

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

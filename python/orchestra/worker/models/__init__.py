"""Model families: one file each, composed of the shared layers."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.layers import LoadContext
from orchestra.worker.loader import Progress
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.models.llama import Llama


class Model(Protocol):
    """A loaded model: this rank's part of it."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> Tensor | None:
        """Runs one step.

        Args:
            token_ids: `int64[T]`.
            positions: `int64[T]`.
            attention: prepared for the step.
            rows: `int64[N]`, the tokens whose logits are wanted; None: all, in order.

        Returns:
            The logits `[N, vocab_size]`; None on other ranks than rank 0, and where `N` is 0.
        """
        ...


Loader = Callable[[LoadContext, ModelConfig, int, Progress], Model]

# The architectures of `model_config` by the file that builds them.
LOADERS: dict[str, Loader] = {
    "LlamaForCausalLM": Llama.load,
    "MistralForCausalLM": Llama.load,
    "Qwen2ForCausalLM": Llama.load,
    "Qwen3ForCausalLM": Llama.load,
}

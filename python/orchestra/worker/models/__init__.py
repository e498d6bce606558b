"""Model families: one file each, composed of the shared layers."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.layers import LoadContext
from orchestra.worker.loader import Progress
from orchestra.worker.logits import Logits
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.models.decoder import Decoder, LoadLayer
from orchestra.worker.models.deepseek import DeepseekLayer
from orchestra.worker.models.gemma import GemmaLayer
from orchestra.worker.models.llama import LlamaLayer
from orchestra.worker.models.mixture import load_mixtral_layer, load_qwen3_layer


class Model(Protocol):
    """A loaded model: this rank's part of it."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> Logits | None:
        """Runs one step.

        Args:
            token_ids: `int64[T]`.
            positions: `int64[T]`.
            attention: prepared for the step.
            rows: `int64[N]`, the tokens whose logits are wanted; None: all, in order.

        Returns:
            The logits of `N` rows; None on the ranks of other stages than the last, and where `N` is 0.
        """
        ...

    def forget(self) -> None:
        """Lets go of recorded steps, as must be done when the group of ranks has changed: they hold its sums."""
        ...


Loader = Callable[[LoadContext, ModelConfig, int, Progress], Decoder]

# The architectures of `families` by what loads one of their layers.
LAYER_LOADERS: dict[str, LoadLayer] = {
    "LlamaForCausalLM": LlamaLayer.load,
    "MistralForCausalLM": LlamaLayer.load,
    "Qwen2ForCausalLM": LlamaLayer.load,
    "Qwen3ForCausalLM": LlamaLayer.load,
    "Phi3ForCausalLM": LlamaLayer.load,
    "MixtralForCausalLM": load_mixtral_layer,
    "Qwen3MoeForCausalLM": load_qwen3_layer,
    "DeepseekV2ForCausalLM": DeepseekLayer.load,
    "DeepseekV3ForCausalLM": DeepseekLayer.load,
    "Gemma2ForCausalLM": GemmaLayer.load,
    "Gemma3ForCausalLM": GemmaLayer.load,
}

LOADERS: dict[str, Loader] = {
    name: partial(Decoder.load, load) for name, load in LAYER_LOADERS.items()
}

"""A model computed by transformers' own modules, over our cache: any architecture whose attention is plain."""

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.attention import AttentionBackend
from orchestra.worker.hf_attention import (
    IMPLEMENTATION,
    AttentionCall,
    LayerTable,
    read_rule,
    running,
)
from orchestra.worker.hf_config import HfConfig, HfShape, check_rotations
from orchestra.worker.loader import NAMED_IN_ERRORS_MAX
from orchestra.worker.logits import WholeLogits

# Tokens of the run that is watched: more than one, so that every module takes its path for several.
_WATCHED_TOKENS = 4
# Computed tables that old checkpoints carry.
_IGNORED_WEIGHTS = ("rotary_emb.inv_freq",)


class HfModel:
    """A whole model on one rank; a `models.Model`.

    Args:
        module: transformers' `…ForCausalLM` (whose types mean nothing to a checker), which looks its attention up under
            `hf_attention.IMPLEMENTATION`.
        table: its attention modules.
    """

    def __init__(self, module: Any, table: LayerTable) -> None:
        self.module = module
        self._table = table

    @classmethod
    def load(
        cls,
        model_dir: Path,
        config: HfConfig,
        dtype: torch.dtype,
        device: torch.device,
        longest: int,
    ) -> "tuple[HfModel, HfShape]":
        """Loads the weights and watches one run.

        Args:
            model_dir: the checkpoint directory; nothing is fetched from elsewhere, none of its code is run.
            config: read from it.
            dtype: to compute in.
            device: to compute on.
            longest: sequence that will ever run, tokens.

        Returns:
            The model, and what its cache and attention have to be like.

        Raises:
            ConfigError: the weights are damaged, or do not fit the configuration.
            UnsupportedError: the model needs more than causal attention over its own keys and values.
        """
        check_rotations(config.source, longest)
        module = _load_module(model_dir, config, dtype)
        module.to(device)
        _check_arguments(module)
        table = LayerTable()
        model = cls(module, table)
        model._watch(config, torch.arange(min(_WATCHED_TOKENS, longest), device=device))
        return model, _read_shape(config, module, table, longest, device)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> WholeLogits | None:
        """Runs one step; see `models.Model`."""
        with running(self._table, attention):
            logits = self.logits(token_ids, positions, rows)
        return WholeLogits(logits) if logits.shape[0] else None

    def forget(self) -> None:
        """Does nothing: no step is recorded."""

    @torch.inference_mode()
    def _watch(self, config: HfConfig, tokens: Tensor) -> None:
        """Runs once to learn of the attention calls; `tokens` is `int64[T]`, both ids and positions."""
        try:
            with running(self._table, None):
                logits = self.logits(tokens % config.vocab_size, tokens, None)
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _refuse_code(config.architecture, error) from error
        if logits.shape[-1] != config.vocab_size:
            raise UnsupportedError(
                f"vocab_size: {config.vocab_size}, but the model gives {logits.shape[-1]} logits"
            )

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor | None) -> Tensor:
        """Runs the module on one flat batch, within `hf_attention.running`; arguments as in `forward`."""
        output = self.module(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=0 if rows is None else rows,
        )
        logits: Tensor = output.logits[0]
        return logits


def _load_module(model_dir: Path, config: HfConfig, dtype: torch.dtype) -> nn.Module:
    module: nn.Module
    disable_progress_bar()
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"transformers cannot load the checkpoint: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise _refuse_code(config.architecture, error) from error
    _check_weights(report)
    return module


def _refuse_code(architecture: str, error: Exception) -> UnsupportedError:
    """What is left to say where the model's own code fails, as it may without its own attention function."""
    line = " ".join(str(error).split())
    return UnsupportedError(
        f"architectures: {architecture} fails with an attention function that is not its own"
        f" ({type(error).__name__}: {line})"
    )


def _check_weights(report: dict[str, Any]) -> None:
    """Refuses what transformers only warns of: weights that it had to invent or had no place for."""
    left = [name for name in report["unexpected_keys"] if not name.endswith(_IGNORED_WEIGHTS)]
    faults = {
        "the checkpoint has no weight": report["missing_keys"],
        "config.json means another shape of": [entry[0] for entry in report["mismatched_keys"]],
        "the checkpoint has weights that the model does not:": left,
    }
    for fault, found in faults.items():
        if found:
            names = ", ".join(sorted(found)[:NAMED_IN_ERRORS_MAX])
            more = len(found) - NAMED_IN_ERRORS_MAX
            raise ConfigError(f"{fault} {names}" + (f" and {more} more" if more > 0 else ""))


def _check_arguments(module: nn.Module) -> None:
    """Refuses a module that finds positions out by itself, or computes logits of every token."""
    taken = inspect.signature(module.forward).parameters
    for name in ("position_ids", "logits_to_keep"):
        if name not in taken:
            raise UnsupportedError(f"architectures: {type(module).__name__} takes no {name}")


def _read_shape(
    config: HfConfig, module: nn.Module, table: LayerTable, longest: int, device: torch.device
) -> HfShape:
    """Puts together what the watched run has told."""
    calls = table.calls
    layers = getattr(config.source, "num_hidden_layers", None)
    if len(calls) != layers:
        raise UnsupportedError(
            f"num_hidden_layers: {len(calls)} of {layers} layers attend through transformers' attention interface"
        )
    first = calls[0]
    for call in calls:
        _check_call(call, first)
    return HfShape(
        **vars(config),
        num_layers=len(calls),
        num_heads=first.query[1],
        num_kv_heads=first.key[1],
        head_dim=first.query[3],
        mlp_width=_mlp_width(config, module),
        attention=tuple(read_rule(call, longest, device) for call in calls),
    )


def _check_call(call: AttentionCall, first: AttentionCall) -> None:
    """Compares what a layer caches with the first layer, and its parts with each other."""
    if (call.query, call.key) != (first.query, first.key):
        raise UnsupportedError("head_dim: layers with heads of different numbers or sizes")
    if call.value != call.key or call.key[3] != call.query[3]:
        raise UnsupportedError("v_head_dim: keys, values and queries differ in size")
    if call.key[2] != call.query[2] or call.query[1] % call.key[1]:
        raise UnsupportedError("num_key_value_heads: keys are not those of the step's own tokens")


def _mlp_width(config: HfConfig, module: nn.Module) -> int:
    """Upper estimate of the numbers of a token that lie side by side between two weights of a layer."""
    chosen = getattr(config.source, "num_experts_per_tok", None) or 1
    widest = max(
        (max(weight.shape[-2:]) for weight in module.parameters() if _is_inner(weight, config)),
        default=config.hidden_size,
    )
    # Every expert has its own copy of the token too.
    return widest if chosen == 1 else int(chosen) * (widest + config.hidden_size)


def _is_inner(weight: Tensor, config: HfConfig) -> bool:
    """Whether a weight is a matrix, and not the embedding or the head."""
    return weight.dim() > 1 and weight.shape[0] != config.vocab_size

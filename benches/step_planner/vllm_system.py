"""vLLM's own scheduler, `vllm.v1.core.sched.scheduler.Scheduler`, without an engine around it.

It is built as vLLM's engine core builds it: default policy, prefix caching on with the default hash, no speculation,
no connector. The model is a one-layer Llama that exists as a configuration file only, since no scheduler reads weights.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benches.step_planner.workload import Case

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 1 << 30,
    "torch_dtype": "float32",
}


class Vllm:
    """One scheduler with the case's requests, all of which decode once it is built.

    Args:
        case: what runs.
        folder: where the model's configuration file may be written.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.num_tokens = 0
        config = _config(case, folder)
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(case.block_size, hash_function)
        spec = FullAttentionSpec(
            block_size=case.block_size, num_kv_heads=2, head_size=32, dtype=torch.float32
        )
        groups = [KVCacheGroupSpec(["layer"], spec)]
        with set_current_vllm_config(config):
            self._scheduler = Scheduler(
                vllm_config=config,
                kv_cache_config=KVCacheConfig(case.num_blocks, [], groups),
                structured_output_manager=StructuredOutputManager(config),
                block_size=case.block_size,
            )
        for number in range(case.num_seqs):
            self._add(case, number)
        while any(
            request.is_prefill_chunk or not request.num_output_tokens
            for request in self._requests()
        ):
            self.step()

    def step(self) -> tuple[int, int]:
        """Plans and commits a step; returns the nanoseconds of each.

        It is the thread's processor time: a step takes milliseconds, and on a busy machine it would be charged with
        what others do in between.
        """
        began = time.thread_time_ns()
        plan = self._scheduler.schedule()
        planned = time.thread_time_ns() - began
        self.num_tokens = plan.total_num_scheduled_tokens
        output = self._output(plan)
        began = time.thread_time_ns()
        self._scheduler.update_from_output(plan, output)
        return planned, time.thread_time_ns() - began

    def _add(self, case: Case, number: int) -> None:
        parameters = SamplingParams(max_tokens=case.max_tokens, ignore_eos=True)
        request = Request(
            request_id=str(number),
            prompt_token_ids=case.prompt(number),
            sampling_params=parameters,
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self._scheduler.add_request(request)

    def _requests(self) -> list[Request]:
        return list(self._scheduler.requests.values())

    def _output(self, plan: Any) -> ModelRunnerOutput:
        """A token for each sequence whose last known token the step computes."""
        ids = list(plan.num_scheduled_tokens)
        requests = self._scheduler.requests
        tokens = []
        for name in ids:
            request = requests[name]
            is_last = request.num_computed_tokens >= request.num_tokens
            tokens.append([request.num_tokens] if is_last else [])
        index = {name: row for row, name in enumerate(ids)}
        return ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=tokens)


def _config(case: Case, folder: Path) -> VllmConfig:
    (folder / "config.json").write_text(
        json.dumps({**_MODEL, "max_position_embeddings": case.max_model_len})
    )
    cache = CacheConfig(block_size=case.block_size, enable_prefix_caching=True)
    cache.num_gpu_blocks = case.num_blocks
    return VllmConfig(
        model_config=ModelConfig(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=case.max_model_len,
        ),
        cache_config=cache,
        scheduler_config=SchedulerConfig(
            max_num_seqs=case.max_num_seqs,
            max_num_batched_tokens=case.max_num_batched_tokens,
            max_model_len=case.max_model_len,
            is_encoder_decoder=False,
        ),
    )

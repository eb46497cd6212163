"""Checks at start: vLLM's functions are those the plugin was written for, and no unsupported setting is on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import vllm
from vllm import envs

from hones_serving import signatures
from hones_serving.settings import Settings
from hones_serving.vllm import connectors
from hones_steer.errors import StateError

TESTED = "0.32"
DEFAULT_MAX_PROFILES = 64
SPECULATION = ("ngram", "draft_model", "eagle", "eagle3", "mtp")  # methods that tests run
_LOSSLESS = ("standard", "block")  # ways of verifying drafts that leave answers the model's own


def check_version() -> None:
    """Compare the signatures of all functions that the plugin wraps with those it was written for.

    Raises:
        StateError: a signature differs; the message names the function.
    """
    signatures.check(_expected_signatures(), f"vLLM {vllm.__version__}", TESTED)


def _expected_signatures() -> Iterator[tuple[Callable[..., Any], tuple[str, ...]]]:
    """Yield (function, names of the parameters that it must begin with) for each function that the plugin wraps.

    And for what some of them are given: `BatchReqState`, `RequestSpecDecodeMetrics`, a step's requests.
    """
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.plugins import load_endpoint_plugins
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
    from vllm.v1.utils import APIServerProcessManager
    from vllm.v1.worker.gpu.model_runner import BatchReqState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1
    from vllm.v1.worker.gpu_worker import Worker

    yield InputProcessor.__init__, ("self", "vllm_config", "renderer")
    yield InputProcessor.process_inputs, ("self", "request_id", "prompt", "params")
    yield OutputProcessor.add_request, ("self", "request", "prompt", "parent_req", "request_index", "queue")
    yield OutputProcessor.process_outputs, ("self", "engine_core_outputs")
    yield OutputProcessor.abort_requests, ("self", "request_ids", "internal")
    yield OutputProcessor._finish_request, ("self", "req_state")
    yield LLMEngine.__init__, ("self", "vllm_config")
    yield LLMEngine.collective_rpc, ("self", "method")
    yield AsyncLLM.__init__, ("self", "vllm_config")
    yield AsyncMPClient.call_utility_all_async, ("self", "method")
    yield load_endpoint_plugins, ("supported_tasks",)
    yield APIServerProcessManager.__init__, ("self", "listen_address", "sock", "args", "num_servers")
    yield Scheduler.__init__, ("self", "vllm_config")
    yield generate_block_hash_extra_keys, ("request", "start_token_idx", "end_token_idx", "start_mm_idx")
    yield RequestSpecDecodeMetrics, ("num_spec_tokens", "histogram", "num_draft_tokens")
    yield Worker.load_model, ("self",)
    yield RoutedExperts.forward_modular, ("self", "x", "topk_weights", "topk_ids")
    yield FusedMoEExpertsModular.activation, ("self", "activation", "output", "input")
    yield RunnerV1.execute_model, ("self", "scheduler_output", "intermediate_tensors")
    yield RunnerV1._prepare_inputs, ("self", "scheduler_output", "num_scheduled_tokens")
    yield RunnerV2.execute_model, ("self", "scheduler_output", "intermediate_tensors", "dummy_run")
    yield RunnerV2.prepare_inputs, ("self", "scheduler_output", "batch_req_state")
    yield (
        NewRequestData,
        (
            *("req_id", "prompt_token_ids", "mm_features", "sampling_params", "pooling_params", "block_ids"),
            "num_computed_tokens",
        ),
    )
    yield (
        CachedRequestData,
        (
            *("req_ids", "resumed_req_ids", "new_token_ids", "all_token_ids", "new_block_ids"),
            "num_computed_tokens",
        ),
    )
    yield BatchReqState, ("req_ids", "num_scheduled_tokens")


def refuse_unsupported(config: Any, settings: Settings) -> None:
    """Refuse settings of vLLM under which requests would be steered wrongly, or under which steering was never tried.

    The latter are let through if `settings` allow what is untested. `config` is vLLM's VllmConfig.

    Raises:
        StateError: such a setting is on; the message names it.
    """
    if names := _set(_unsupported(config)):
        raise StateError(f"hones-steer does not support {names} in this version; start vLLM without")
    if (names := _set(_untested(config))) and not settings.allow_untested:
        raise StateError(
            f"hones-steer was never run with {names}; start vLLM without, or try it with HONES_ALLOW_UNTESTED=1"
        )


def _set(settings: Mapping[str, bool]) -> str:
    return " and ".join(name for name, is_set in settings.items() if is_set)


def _unsupported(config: Any) -> dict[str, bool]:
    """Settings that do not work, or would steer wrongly, by name; true: it is on."""
    model, parallel, speculative = config.model_config, config.parallel_config, config.speculative_config
    verification = "standard" if speculative is None else speculative.rejection_sample_method
    several = parallel._api_process_count > 1
    return {
        "pooling models": model.runner_type != "generate",
        "encoder-decoder models": model.is_encoder_decoder,
        "diffusion models": model.is_diffusion,
        # A forward computes tokens of other ranks, or experts under other numbers.
        "data parallelism of a mixture of experts": model.is_moe and parallel.data_parallel_size > 1,
        "expert load balancing (--enable-eplb)": parallel.enable_eplb,
        "microbatching (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        # What one API server has admitted, the others would have to know before they load profiles of other experts.
        "several API servers before a mixture of experts (give --api-server-count 1)": model.is_moe and several,
        # Workers know a request by its id alone.
        "request ids that clients choose (VLLM_DISABLE_REQUEST_ID_RANDOMIZATION) with several API servers": (
            envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION and several
        ),
        "the Rust frontend (VLLM_USE_RUST_FRONTEND)": envs.VLLM_USE_RUST_FRONTEND,
        **dict.fromkeys(connectors.unsupported(config.kv_transfer_config), True),
        # The number of tokens of each request is then known to the GPU only.
        "adaptive verification (speculative_config.enable_adaptive_verification)": (
            speculative is not None and speculative.enable_adaptive_verification
        ),
        # Drafts, which nothing steers, would be answers.
        f"unverified drafts (speculative_config.rejection_sample_method {verification!r})": (
            verification not in _LOSSLESS
        ),
    }


def _untested(config: Any) -> dict[str, bool]:
    """Settings that no test runs, by name; true: it is on."""
    parallel, speculative = config.parallel_config, config.speculative_config
    backend = parallel.distributed_executor_backend
    return {
        # Several servers then share the replicas, or the replicas are not this server's own processes.
        "data parallelism over several machines, by Ray, or behind a load balancer of your own": (
            parallel.data_parallel_size > 1
            and (
                parallel.data_parallel_size_local != parallel.data_parallel_size
                or parallel.data_parallel_backend != "mp"
                or parallel.local_engines_only
            )
        ),
        f"the executor backend {backend!r}": backend not in (None, "uni", "mp"),
        "an encoder-cache connector": config.ec_transfer_config is not None,
        **dict.fromkeys(connectors.untested(config.kv_transfer_config), True),
        "speculative decoding in a pipeline": speculative is not None and parallel.pipeline_parallel_size > 1,
        f"speculative decoding by {speculative and speculative.method!r}": (
            speculative is not None and speculative.method not in SPECULATION
        ),
    }


def max_profiles(config: Any, settings: Settings) -> int:
    """Number of different profiles that the tables hold at once, the identity not counted."""
    return settings.max_profiles or min(max_requests(config), DEFAULT_MAX_PROFILES)


def max_admitted(config: Any, settings: Settings) -> int | None:
    """Number of different profiles that one API server may have in use at once; None: any, slots never run out.

    Several API servers have a part of the slots each: none knows what the others have admitted, and a profile that two
    of them use counts twice.

    Raises:
        StateError: there are fewer slots than API servers.
    """
    slots = max_profiles(config, settings)
    servers: int = config.parallel_config._api_process_count
    if slots >= max_requests(config):
        return None
    if slots < servers:
        raise StateError(f"--max-profiles is {slots}, but {servers} API servers need one each; raise it")
    return slots // servers


def max_requests(config: Any) -> int:
    """Largest number of requests that one step of the engine schedules."""
    limit: int = config.scheduler_config.max_num_seqs
    return limit

# SPDX-License-Identifier: Apache-2.0
"""Changes to vLLM's configuration for diffusion models, so that no flag is needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode, ModelConfig
from vllm.config.vllm import OptimizationLevel
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_sparse_dllm.engine import cpu_cores
from vllm_sparse_dllm.engine.omp_waiting import wait_shortly, waiting_of
from vllm_sparse_dllm.engine.structured_output import DEFAULT_BACKEND
from vllm_sparse_dllm.kernels import dtype_name, native
from vllm_sparse_dllm.models.configs import check_config
from vllm_sparse_dllm.plugin import RAY_ON_CPU
from vllm_sparse_dllm.settings import ATTENTION_BACKENDS, CONFIG_KEY, EngineSettings

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, SchedulerConfig, VllmConfig

logger = init_logger("vllm." + __name__)

_SCHEDULER = "vllm_sparse_dllm.engine.scheduler.DiffusionScheduler"
_WORKERS = {
    "cpu": "vllm_sparse_dllm.engine.cpu_worker.DiffusionCPUWorker",
    "cuda": "vllm_sparse_dllm.engine.worker.DiffusionGPUWorker",
}
#: The smallest page size at which vLLM's CPU attention kernel runs at full speed.
_CPU_PAGE_SIZE = 32
#: Reasons for the refusals that need one, appended to the error message.
_REASONS = {
    "kv_cache_dtype": "; a checkpoint may ask for it, and --kv-cache-dtype overrides that",
    "pipeline_parallel_size": ": a step needs the tokens of the last one, so stages would idle",
    "watermark": ": an admitted request never lacks pages",
    "long_prefill_token_threshold": ": a full pass cannot be cut",
    "scheduler_reserve_full_isl": ": a request is admitted with all its pages",
    "diffusion_config": f'; settings go into additional_config["{CONFIG_KEY}"]',
    "enable_mfu_metrics": ": vLLM counts a step's work for causal attention",
    "VLLM_USE_RUST_FRONTEND": ": requests are checked in the Python front end",
}
#: Bytes that vLLM's own processes take before the pool is allocated, with some margin.
_MEMORY_OF_PROCESSES = 2 << 30


class DiffusionModelConfig(ModelConfig):
    """vLLM's model configuration with defaults for diffusion models.

    `DiffusionConfigHook` sets this class on the existing configuration of a diffusion model, so
    the attributes below are not dataclass fields.

    Attributes:
        default_response_length: Response length of a request that names none.
        graph_tokens: Sizes, in tokens, of the steps to capture as CUDA graphs; None for the
            default sizes.
        most_graph_tokens: Upper limit of the default sizes, in tokens; None for the default.
    """

    default_response_length: int = 256
    graph_tokens: list[int] | None = None
    most_graph_tokens: int | None = None

    def get_diff_sampling_param(self) -> dict[str, Any]:
        """Default to temperature 0 and to `default_response_length` tokens.

        Values of the generation config take precedence; ``generation_config="vllm"`` leaves the
        temperature to vLLM.
        """
        defaults = super().get_diff_sampling_param()
        if self.generation_config in ("auto", "vllm"):
            # With a generation config of the user's, vLLM would treat this as an upper limit.
            defaults.setdefault("max_tokens", self.default_response_length)
        if self.generation_config != "vllm":
            defaults.setdefault("temperature", 0.0)
        return defaults


class DiffusionConfigHook(VerifyAndUpdateConfig):
    """The configuration hook; in vLLM's `MODELS_CONFIG_MAP` for each architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Choose worker and scheduler and disable what does not apply to diffusion models.

        Raises:
            ValueError: If the configuration asks for something diffusion models cannot do.
        """
        model_config = vllm_config.model_config
        check_config(model_config.hf_config)
        settings = EngineSettings.from_additional_config(vllm_config.additional_config)
        _refuse(vllm_config)
        _warn_of_switched_off(vllm_config)
        _check_executor(vllm_config.parallel_config)
        _check_tensor_parallel(vllm_config)
        _check_attention_backend(vllm_config, settings.attention_backend)

        model_config.__class__ = DiffusionModelConfig
        assert isinstance(model_config, DiffusionModelConfig)
        model_config.default_response_length = settings.default_response_length

        parallel = vllm_config.parallel_config
        worker = _WORKERS["cpu" if current_platform.is_cpu() else "cuda"]
        if parallel.worker_cls == "auto":
            parallel.worker_cls = worker
        elif str(parallel.worker_cls).startswith("vllm."):
            raise ValueError(
                f"worker_cls must be auto or a subclass of {worker} for diffusion models, got "
                f"{parallel.worker_cls}"
            )
        scheduler = vllm_config.scheduler_config
        scheduler.scheduler_cls = _SCHEDULER
        scheduler.async_scheduling = False
        # A full forward cannot be split: every position attends to every other.
        scheduler.enable_chunked_prefill = False
        vllm_config.cache_config.enable_prefix_caching = False
        if vllm_config.structured_outputs_config.backend == "auto":
            vllm_config.structured_outputs_config.backend = DEFAULT_BACKEND
        _take_over_graphs(vllm_config, model_config)

        _raise_default_token_budget(vllm_config)
        cache = vllm_config.cache_config
        if current_platform.is_cpu():
            native.switched_off()  # Validates the variable here instead of in a worker.
            if not cache.user_specified_block_size:
                cache.block_size = _CPU_PAGE_SIZE
                # Keeps the platform from replacing it by its own default.
                cache.user_specified_block_size = True
            if parallel.use_ray:
                _prepare_ray(parallel)
            _use_all_cores(parallel)
            _leave_memory_to_others(vllm_config)


def _take_over_graphs(vllm_config: VllmConfig, model_config: DiffusionModelConfig) -> None:
    """Disable vLLM's own CUDA graphs and compilation, and keep the options for `BlockGraphs`.

    vLLM clears the capture sizes when its own graphs are off, so they are stored in the model's
    configuration.
    """
    compilation = vllm_config.compilation_config
    off = compilation.cudagraph_mode == CUDAGraphMode.NONE
    if off or vllm_config.optimization_level == OptimizationLevel.O0:
        model_config.graph_tokens = []
    elif compilation.cudagraph_capture_sizes is not None:
        model_config.graph_tokens = list(compilation.cudagraph_capture_sizes)
    model_config.most_graph_tokens = compilation.max_cudagraph_capture_size
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.NONE


def _refuse(vllm_config: VllmConfig) -> None:
    """Refuse engine options that would have no effect or the wrong effect."""
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    attention, scheduler = vllm_config.attention_config, vllm_config.scheduler_config
    assert isinstance(model.dtype, torch.dtype)
    dtype = dtype_name(model.dtype)
    options: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("runner", model.runner_type, ("generate",)),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, (1,)),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size, (1,)),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size, (1,)),
        ("speculative_config", vllm_config.speculative_config, (None,)),
        ("enable_lora", vllm_config.lora_config is not None, (False,)),
        ("kv_transfer_config", vllm_config.kv_transfer_config, (None,)),
        ("ec_transfer_config", vllm_config.ec_transfer_config, (None,)),
        ("diffusion_config", vllm_config.diffusion_config, (None,)),
        ("kv_offloading_size", cache.kv_offloading_size, (None,)),
        ("weight_transfer_config", vllm_config.weight_transfer_config, (None,)),
        ("cpu_offload_gb", vllm_config.offload_config.uva.cpu_offload_gb, (0,)),
        ("offload_group_size", vllm_config.offload_config.prefetch.offload_group_size, (0,)),
        ("kv_cache_dtype", cache.cache_dtype, ("auto", dtype)),
        ("logprobs_mode", model.logprobs_mode, ("raw_logprobs",)),
        ("logits_processors", model.logits_processors, (None, [])),
        ("enable_mfu_metrics", vllm_config.observability_config.enable_mfu_metrics, (False,)),
        ("VLLM_USE_RUST_FRONTEND", envs.VLLM_USE_RUST_FRONTEND, (False,)),
        ("watermark_config", getattr(vllm_config, "watermark_config", None), (None,)),
        ("attention_config.backend_per_kind", attention.backend_per_kind, ({},)),
        ("attention_config.flash_attn_version", attention.flash_attn_version, (None,)),
        ("scheduler_cls", scheduler.scheduler_cls, (None, _SCHEDULER)),
        ("watermark", scheduler.watermark, (0.0,)),
        ("long_prefill_token_threshold", scheduler.long_prefill_token_threshold, (0,)),
        ("prefill_schedule_interval", scheduler.prefill_schedule_interval, (1,)),
        ("scheduler_reserve_full_isl", scheduler.scheduler_reserve_full_isl, (True,)),
    )
    for name, value, allowed in options:
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed if choice != [])
            why = _REASONS.get(name, "")
            raise ValueError(
                f"{name} must be {choices} for diffusion models, got {_shown(value)}{why}"
            )


def _warn_of_switched_off(vllm_config: VllmConfig) -> None:
    """Log the options that were set for what diffusion models switch off.

    Chunked prefill and prefix caching themselves are on by default, so it is not known whether
    they were set.
    """
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    options: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("async_scheduling", scheduler.async_scheduling, (None, False)),
        ("prefix_match_unit", cache.prefix_match_unit, (None,)),
        ("prefix_caching_hash_algo", cache.prefix_caching_hash_algo, ("sha256",)),
        ("prefix_cache_retention_interval", cache.prefix_cache_retention_interval, (0,)),
    )
    given = [f"{name}={value!r}" for name, value, neutral in options if value not in neutral]
    if given:
        logger.warning(
            "Diffusion models have no async scheduling and no prefix caching, so these have no "
            "effect: %s",
            ", ".join(given),
        )


def _check_executor(parallel: ParallelConfig) -> None:
    """Refuse an executor under which each rank has a scheduler of its own.

    They would have to decide alike, but the time that steps take decides how many run at once.
    """
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise ValueError(
            "distributed_executor_backend must be mp, ray or uni for a diffusion model on "
            f"{parallel.world_size} ranks, got 'external_launcher'"
        )


def _check_tensor_parallel(vllm_config: VllmConfig) -> None:
    """Refuse a tensor-parallel size that heads, channels or the vocabulary do not allow.

    vLLM checks the query heads itself, after this hook.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size

    ranks = vllm_config.parallel_config.tensor_parallel_size
    config = vllm_config.model_config.hf_config
    kv_heads, channels = config.num_key_value_heads, config.intermediate_size
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"tensor_parallel_size must divide the {kv_heads} key/value heads of this model or "
            f"be a multiple of them, got {ranks}"
        )
    if channels % ranks:
        raise ValueError(
            f"tensor_parallel_size must divide the {channels} feed-forward channels of this "
            f"model, got {ranks}"
        )
    rows = pad_vocab_size(getattr(config, "embedding_size", config.vocab_size))
    if rows % ranks:
        raise ValueError(
            f"tensor_parallel_size must divide the {rows} rows of this model's padded vocabulary, "
            f"got {ranks}"
        )


def _check_attention_backend(vllm_config: VllmConfig, name: str) -> None:
    """Refuse vLLM's own option for the backend, and a backend that cannot run here."""
    from vllm_sparse_dllm.attention.backends import choose_backend
    from vllm_sparse_dllm.attention.interface import AttentionShape

    chosen = vllm_config.attention_config.backend
    if chosen is not None:
        raise ValueError(
            f"attention_backend must be auto for diffusion models, got {chosen.name}; they have "
            f'their own: additional_config["{CONFIG_KEY}"]["attention_backend"], one of '
            f"{', '.join(ATTENTION_BACKENDS)}"
        )
    if name == "auto":
        return
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    shape = AttentionShape(
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
        model.get_head_size(),
    )
    device = torch.device("cpu" if current_platform.is_cpu() else "cuda")
    assert isinstance(model.dtype, torch.dtype)
    choose_backend(name, shape, vllm_config.cache_config.block_size, model.dtype, device)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__}(...)"


def _raise_default_token_budget(vllm_config: VllmConfig) -> None:
    """Raise the token budget to hold a request of the whole context, unless the user set it.

    vLLM fills in its default before this hook runs and does not record that it did; a budget
    equal to one of its defaults is assumed to be one.

    Raises:
        ValueError: If steps may have more tokens than memory is reserved for.
    """
    from vllm.engine.arg_utils import EngineArgs

    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    context = vllm_config.model_config.max_model_len
    given = scheduler.max_num_batched_tokens
    world_size = parallel.pipeline_parallel_size * parallel.tensor_parallel_size
    defaults, _ = EngineArgs.get_batch_defaults(world_size)
    default_budgets = {scheduler.DEFAULT_MAX_NUM_BATCHED_TOKENS, *defaults.values()}
    default_budgets |= {2 * tokens for tokens in default_budgets}
    if given < context and given in default_budgets:
        logger.warning(
            "Raising max_num_batched_tokens from %d, a default of vLLM's, to the context length "
            "%d: a diffusion model runs a request whole. If you did set it, set another value",
            given,
            context,
        )
        scheduler.max_num_batched_tokens = context
        scheduler.max_num_encoder_input_tokens = context
        scheduler.encoder_cache_size = context
    name, budget = token_budget(scheduler)
    if budget > scheduler.max_num_batched_tokens:
        raise ValueError(
            f"{name} must be at most max_num_batched_tokens={scheduler.max_num_batched_tokens}, "
            f"which memory is reserved for, got {budget}"
        )
    if budget < context:
        logger.warning(
            "%s=%d is below the context length %d: requests whose prompt and max_tokens exceed it "
            "will be refused",
            name,
            budget,
            context,
        )


def token_budget(scheduler: SchedulerConfig) -> tuple[str, int]:
    """Return the option that limits the tokens of a step, and its value."""
    if scheduler.max_num_scheduled_tokens is not None:
        return "max_num_scheduled_tokens", scheduler.max_num_scheduled_tokens
    return "max_num_batched_tokens", scheduler.max_num_batched_tokens


def _leave_memory_to_others(vllm_config: VllmConfig) -> None:
    """Lower vLLM's default share of the memory to what is free, unless the user set one.

    The default, 0.92 of all memory, is meant for a GPU. On a machine whose memory is partly in
    use, vLLM would refuse to start.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    cache = vllm_config.cache_config
    if (
        cache.kv_cache_memory_bytes is not None
        or cache.gpu_memory_utilization != EngineArgs.gpu_memory_utilization
    ):
        return
    memory = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
    parallel = vllm_config.parallel_config
    # The local size is 0 if all engines of a front end run on other machines.
    workers = parallel.world_size * max(1, parallel.data_parallel_size_local)
    share = (memory.available_memory - _MEMORY_OF_PROCESSES) / memory.total_memory / workers
    if 0 < share < cache.gpu_memory_utilization:
        cache.gpu_memory_utilization = share
        logger.info("Lowering gpu_memory_utilization to %.2f, the memory that is free", share)


def _prepare_ray(parallel: ParallelConfig) -> None:
    """Make Ray's processes use the platform and the OpenMP waiting of this process."""
    if not current_platform.ray_device_key:
        raise ValueError(
            f"Ray needs the environment variable {RAY_ON_CPU}=1 on a CPU, got "
            f"{os.environ.get(RAY_ON_CPU)!r}"
        )
    environment: Any = dict(parallel.ray_runtime_env or {})
    given = environment.get("env_vars", {})
    environment["env_vars"] = {RAY_ON_CPU: "1", **waiting_of(given, os.environ), **given}
    parallel.ray_runtime_env = environment


def pages_of_an_engine(vllm_config: VllmConfig) -> int | None:
    """Return the number of pages in one engine's pool; None before the pool exists.

    A front end knows only the sum over the engines that it manages; if their pools differ, the
    result is the mean.
    """
    blocks, parallel = vllm_config.cache_config.num_gpu_blocks, vllm_config.parallel_config
    if not blocks:
        return None
    local = parallel.local_engines_only
    engines = parallel.data_parallel_size_local if local else parallel.data_parallel_size
    # vLLM keeps one block of each pool for itself.
    return blocks // max(1, engines) - 1


def _use_all_cores(parallel: ParallelConfig) -> None:
    """Let the workers have every core: the front end of a diffusion model is mostly idle.

    vLLM reserves one per worker by default, which may be half of a small machine. Settings of the
    user take precedence.
    """
    cpu_cores.bind_workers(parallel)
    if not os.environ.get(cpu_cores.BINDING):
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    wait_shortly()

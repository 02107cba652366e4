# SPDX-License-Identifier: Apache-2.0
"""The engine as a program: vLLM's `LLM` with the plugin.

For timing, the engine core runs in a process of its own, as users run it; with ``--in-process`` all
runs in one process, so that `probes` can look into the steps. On a GPU, memory is that of tensors
on the device, as reported by the worker.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from programs import Job, peak_memory, reset_peak_memory, serve

if TYPE_CHECKING:
    from probes import StepRecorder
    from vllm import LLM


class Engine:
    """A loaded engine that answers jobs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.in_process:
            # Must be set before vLLM is imported.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import torch
        import vllm
        from vllm.platforms import current_platform

        if arguments.device == "cuda" and not current_platform.is_cuda():
            raise RuntimeError(
                f"vLLM finds no CUDA here but {current_platform.device_type or 'no device'}: its "
                "build may be for another device, or NVIDIA's management library be missing"
            )
        options: dict[str, Any] = dict(arguments.options)
        if arguments.max_num_batched_tokens:
            options["max_num_batched_tokens"] = arguments.max_num_batched_tokens
        if arguments.device_memory:
            options["worker_extension_cls"] = "device_memory.DeviceMemory"
        self.llm: LLM = vllm.LLM(
            str(arguments.model),
            dtype=arguments.dtype,
            max_model_len=arguments.max_model_len,
            max_num_seqs=arguments.max_num_seqs,
            kv_cache_memory_bytes=arguments.kv_cache_bytes,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )
        self.recorder: StepRecorder | None = None
        if arguments.in_process:
            from probes import StepRecorder

            self.recorder = StepRecorder(self.llm)
        self._device_memory = arguments.device_memory
        config = self.llm.llm_engine.vllm_config
        without_kernels, float32_products = None, False
        if config.device_config.device_type == "cpu":
            from vllm_sparse_dllm.kernels.cpu import why_no_cpu_kernels
            from vllm_sparse_dllm.models.cpu_products import wants_float32_products

            without_kernels = why_no_cpu_kernels(config.model_config.dtype)
            float32_products = wants_float32_products(config.model_config.dtype)
        self.about: Job = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "in_process": arguments.in_process,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "page_size": config.cache_config.block_size,
            "without_cpu_kernels": without_kernels,
            "float32_products": float32_products,
            "options": arguments.options,
            "memory": self._ask("memory_held"),
            "kernels": self._ask("kernels_in_use"),
        }

    def _ask(self, method: str) -> Any:
        """Return the reply of the worker's extension; None if there is no extension."""
        return self.llm.collective_rpc(method)[0] if self._device_memory else None

    def handle(self, job: Job) -> Job:
        """Answer all prompts of a job, submitted at once."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=job["response"],
            # Fill every position of every response, whatever the model predicts.
            ignore_eos=True,
            detokenize=False,
            extra_args={
                f"diffusion_{name}": value
                for name, value in job["settings"].items()
                if value is not None
            },
        )
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        recorder = self.recorder if job.get("record") else None
        if recorder is not None:
            recorder.start(detailed=job.get("detailed", False))
        if self._ask("reset_peak_memory") is None:
            reset_peak_memory()
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        result: Job = {
            "seconds": seconds,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        }
        peak = self._ask("peak_memory")
        result["peak_memory"] = peak_memory() if peak is None else peak
        if recorder is not None:
            result["record"] = recorder.stop() | {"response": job["response"]}
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 30)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda: refuse any other")
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument(
        "--device-memory", action="store_true", help="peaks are of the worker's device"
    )
    parser.add_argument(
        "--options", type=json.loads, default={}, metavar="JSON", help="more of vLLM's options"
    )
    arguments = parser.parse_args()

    def load() -> tuple[Job, Any]:
        engine = Engine(arguments)
        return engine.about, engine.handle

    serve(load)


if __name__ == "__main__":
    main()

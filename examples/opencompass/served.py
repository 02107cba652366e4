# SPDX-License-Identifier: Apache-2.0
"""Settings that the configurations share: the paper's decoding, and the connection to a server."""

from opencompass.models import OpenAISDK
from opencompass.partitioners import NaivePartitioner
from opencompass.runners import LocalRunner
from opencompass.tasks import OpenICLEvalTask, OpenICLInferTask

#: Sent with every request, together with the configuration's remasking rule, so that they hold
#: whatever the server's own settings are. Without steps, threshold and factor: one token a step.
paper = dict(
    diffusion_cache_policy="sparse",
    diffusion_keep_ratio=0.5,
    diffusion_kernel_size=3,
    diffusion_delay_steps=1,
    diffusion_granularity="token",
    diffusion_saliency="paper",
    diffusion_eviction_delay=0,
    diffusion_refresh_interval=1,
    diffusion_suffix_window="none",
    diffusion_block_length=32,
    diffusion_steps="none",
    diffusion_threshold="none",
    diffusion_factor="none",
)

#: A model served by `vllm serve`. Without a meta template, OpenCompass sends the examples and the
#: question as the text of a single message.
server = dict(
    type=OpenAISDK,
    openai_api_base="http://localhost:8000/v1",
    key="EMPTY",
    # OpenCompass shortens answers that do not fit, so this exceeds any prompt and its answer.
    max_seq_len=4096,
    max_out_len=256,
    # Requests at once.
    batch_size=32,
    max_workers=32,
    query_per_second=1000,
    retry=2,
    run_cfg=dict(num_gpus=0),
)

work_dir = "outputs/opencompass"
infer = dict(
    partitioner=dict(type=NaivePartitioner),
    runner=dict(type=LocalRunner, max_num_workers=1, task=dict(type=OpenICLInferTask)),
)
eval = dict(
    partitioner=dict(type=NaivePartitioner),
    runner=dict(type=LocalRunner, max_num_workers=4, task=dict(type=OpenICLEvalTask)),
)

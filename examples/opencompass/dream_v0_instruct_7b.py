# SPDX-License-Identifier: Apache-2.0
"""Dream-v0-Instruct-7B, prompted through its chat template."""

from mmengine.config import read_base

with read_base():
    from .benchmarks import chat_datasets as datasets
    from .served import eval, infer, paper, server, work_dir

models = [
    dict(
        **server,
        abbr="dream-v0-instruct-7b-sparse",
        path="dream-v0-instruct-7b",
        tokenizer_path="Dream-org/Dream-v0-Instruct-7B",
        temperature=0.2,
        extra_body=dict(
            top_p=0.95,
            seed=2025,
            vllm_xargs=dict(**paper, diffusion_remasking="entropy"),
        ),
    )
]

# SPDX-License-Identifier: Apache-2.0
"""LLaDA-1.5, which the paper prompts without a chat template."""

from mmengine.config import read_base

with read_base():
    from .benchmarks import datasets
    from .served import eval, infer, paper, server, work_dir

models = [
    dict(
        **server,
        abbr="llada-1.5-sparse",
        path="llada-1.5",
        tokenizer_path="GSAI-ML/LLaDA-1.5",
        temperature=0,
        extra_body=dict(
            # The text is tokenized as it is, without a chat format (plain.jinja).
            add_special_tokens=True,
            vllm_xargs=dict(**paper, diffusion_remasking="low_confidence"),
        ),
    )
]

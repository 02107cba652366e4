# SPDX-License-Identifier: Apache-2.0
"""LLaDA-8B-Instruct, which the paper prompts without a chat template."""

from mmengine.config import read_base

with read_base():
    from .benchmarks import datasets
    from .served import eval, infer, paper, server, work_dir

models = [
    dict(
        **server,
        abbr="llada-8b-instruct-sparse",
        path="llada-8b-instruct",
        tokenizer_path="GSAI-ML/LLaDA-8B-Instruct",
        temperature=0,
        extra_body=dict(
            # The text is tokenized as it is, without a chat format (plain.jinja).
            add_special_tokens=True,
            vllm_xargs=dict(**paper, diffusion_remasking="low_confidence"),
        ),
    )
]

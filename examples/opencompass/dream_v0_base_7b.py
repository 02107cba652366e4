# SPDX-License-Identifier: Apache-2.0
"""Dream-v0-Base-7B, prompted with plain text after its beginning-of-text token."""

from mmengine.config import read_base

with read_base():
    from .benchmarks import datasets
    from .served import eval, infer, paper, server, work_dir

models = [
    dict(
        **server,
        abbr="dream-v0-base-7b-sparse",
        path="dream-v0-base-7b",
        tokenizer_path="Dream-org/Dream-v0-Base-7B",
        temperature=0.2,
        extra_body=dict(
            top_p=0.95,
            seed=2025,
            # Plain text after the beginning-of-text token, without a chat format (plain.jinja).
            add_special_tokens=True,
            chat_template_kwargs=dict(begin=True),
            vllm_xargs=dict(**paper, diffusion_remasking="entropy"),
        ),
    )
]

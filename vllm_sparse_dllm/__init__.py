# SPDX-License-Identifier: Apache-2.0
"""Serve diffusion language models (LLaDA, Dream) with vLLM and a sparse KV cache."""

__version__ = "0.1.0"

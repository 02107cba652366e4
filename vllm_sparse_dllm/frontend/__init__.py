# SPDX-License-Identifier: Apache-2.0
"""What a diffusion model adds to vLLM's front end: admission, traces, refusals, the server's end.

vLLM has no hooks for these, so functions of its front end are wrapped (`wrapping`). For other
models the wrapped functions do what they did; ``patches/README.md`` has the list and the reasons.
"""

# SPDX-License-Identifier: Apache-2.0
"""Dream's tokenizer, which its checkpoints ship as remote code over Qwen2's files."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedConfig, Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Byte-level BPE with Qwen2's vocabulary; the special tokens are in the checkpoint."""


class _NoModel(PreTrainedConfig):
    """A stand-in for a model's configuration, to register a tokenizer by name only."""


def register_tokenizer() -> None:
    """Have transformers find `DreamTokenizer` by its name.

    It is not registered for Dream's configuration: with ``trust_remote_code``, transformers
    prefers a checkpoint's code to a tokenizer registered that way. Dream's code is a slow
    tokenizer, which structured output cannot use.
    """
    AutoTokenizer.register(_NoModel, DreamTokenizer, exist_ok=True)

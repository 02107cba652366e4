# SPDX-License-Identifier: Apache-2.0
"""Dream's tokenizer, which its checkpoints ship as remote code over Qwen2's files."""

from __future__ import annotations

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Byte-level BPE with Qwen2's vocabulary; the special tokens are in the checkpoint."""

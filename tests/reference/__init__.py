"""The slow reference: LLaDA and Dream decoding in plain PyTorch, one request at a time.

Used by tests only; written from ``algorithms.md`` ("A<n>" and "B<n>" in comments are its
sections), without any code of the engine.
"""

from .checkpoints import write_checkpoint
from .decode import Stats, generate, generate_with_stats
from .models import Forward, Model, load

__all__ = [
    "Forward",
    "Model",
    "Stats",
    "generate",
    "generate_with_stats",
    "load",
    "write_checkpoint",
]

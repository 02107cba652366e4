# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against their twins: on a GPU, or in Triton's interpreter.

The interpreter has to be asked for before Triton is imported, which other tests do; so without
a GPU these run in a process of their own, ``TRITON_INTERPRET=1 pytest tests/kernels``, which
`tests/unit/test_kernels.py` starts.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from vllm_sparse_dllm.kernels import interpreted

settings.register_profile("kernels", deadline=None, derandomize=True, max_examples=12)

if not interpreted() and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
else:
    settings.load_profile("kernels")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return where the kernels run."""
    return torch.device("cpu" if interpreted() else "cuda")

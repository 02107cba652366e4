# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against their twins: on a GPU, or in Triton's interpreter.

The interpreter must be enabled before Triton is imported, and other tests import it. So without
a GPU these tests run in a process of their own, ``TRITON_INTERPRET=1 pytest tests/kernels``, which
`tests/unit/test_kernels.py` starts.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from tests.interpreter import patch_language_once
from vllm_sparse_dllm.kernels import interpreted

settings.register_profile("kernels", deadline=None, derandomize=True, max_examples=12)

if not interpreted() and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
else:
    settings.load_profile("kernels")
if interpreted():
    patch_language_once()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device that the kernels run on."""
    return torch.device("cpu" if interpreted() else "cuda")

# SPDX-License-Identifier: Apache-2.0
"""Importing this module imports vLLM; see `tests.warm`."""

from tests.warm import preload

preload()

# SPDX-License-Identifier: Apache-2.0
"""How OpenMP's threads wait for each other.

The OpenMP library reads these variables when it is loaded, so this module must not import PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

#: Environment variables for the waiting. Waking a sleeping thread takes as long as a small
#: operation, and a block step has a dozen of these in each layer; a spinning thread takes the core
#: from the front end and everything else on the machine. So a thread spins for a fraction of a
#: millisecond, about the time between two operations, and then sleeps.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}


def waiting_of(*environments: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that set how the threads of new processes wait.

    Args:
        environments: Variables and their values, including the user's; the first take precedence.

    Returns:
        Those of `WAITING` in the first environment that has any, since the user has decided; if
        none has, `WAITING`.
    """
    for environment in environments:
        if chosen := {name: environment[name] for name in WAITING if name in environment}:
            return chosen
    return dict(WAITING)


def wait_shortly() -> None:
    """Set the variables for the OpenMP threads of processes that start from now on."""
    os.environ.update(waiting_of(os.environ))

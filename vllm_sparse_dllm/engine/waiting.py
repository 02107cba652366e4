# SPDX-License-Identifier: Apache-2.0
"""How OpenMP's threads wait for each other.

The library reads this as it is loaded, so this module has to be usable before PyTorch is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

#: How OpenMP's threads wait for each other. Waking one that sleeps takes as long as a small
#: operation, and a block step has a dozen of them in each layer; one that spins takes the core
#: from the front end and from whoever else runs on the machine. So a thread spins for a part of a
#: millisecond, about what lies between two operations, and then sleeps.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}


def waiting_of(*environments: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which the threads of further processes wait.

    Args:
        environments: Variables and their values, the user's among them; the first counts most.

    Returns:
        Those of `WAITING` in the first environment that has any, since the user has decided; if
        none has, `WAITING`.
    """
    for environment in environments:
        if chosen := {name: environment[name] for name in WAITING if name in environment}:
            return chosen
    return dict(WAITING)


def wait_shortly() -> None:
    """Have OpenMP's threads of processes that start from now on wait so."""
    os.environ.update(waiting_of(os.environ))

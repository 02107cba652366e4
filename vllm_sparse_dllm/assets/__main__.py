# SPDX-License-Identifier: Apache-2.0
"""Print the path of an embedded checkpoint."""

from __future__ import annotations

import argparse

from vllm_sparse_dllm.assets import embedded_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_sparse_dllm.assets", description=__doc__)
    parser.add_argument("name", nargs="?", default="tiny-llada", help="default: %(default)s")
    try:
        print(embedded_model(parser.parse_args().name))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

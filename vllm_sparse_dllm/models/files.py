# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint's unreadable files, which the libraries that read them do not name."""

from __future__ import annotations

import zipfile

from safetensors import SafetensorError, safe_open
from vllm.config import LoadConfig, ModelConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader


def check_files(model_config: ModelConfig, load_config: LoadConfig, error: Exception) -> None:
    """Look for broken files after loading has failed.

    Args:
        model_config: Says where the checkpoint is.
        load_config: Says which of its files are read.
        error: The error that loading failed with.

    Raises:
        ValueError: Naming the files that are truncated or damaged.
    """
    loader = get_model_loader(load_config)
    # A ValueError already says what is wrong, and a FileNotFoundError names the file.
    if isinstance(error, ValueError | FileNotFoundError) or not isinstance(
        loader, DefaultModelLoader
    ):
        return
    try:
        _, paths, _, _ = loader._prepare_weights(
            model_config.model,
            None,
            model_config.revision,
            fall_back_to_pt=True,
            allow_patterns_overrides=None,
        )
    except Exception:
        return  # there are no files; the error that brought us here says so
    broken = [path for path in paths if not _is_whole(path)]
    if broken:
        raise ValueError(
            f"the checkpoint's file {', '.join(broken)} is truncated or damaged: {error}"
        ) from error


def _is_whole(path: str) -> bool:
    if not path.endswith(".safetensors"):
        return zipfile.is_zipfile(path)
    try:
        # Opening compares the header with the file's size.
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False

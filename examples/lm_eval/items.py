# SPDX-License-Identifier: Apache-2.0
"""The items of the task `tiny_recall`: held-out questions for the embedded models, as JSON lines.

As a script, this writes the file of items. lm-evaluation-harness calls `load` (`recall.yaml`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset

FOLDER = Path(__file__).parent
FILE = FOLDER / "recall.jsonl"
#: Tokens per prompt, and items per task.
LENGTH, NUM_ITEMS = 128, 20
TASKS = ("retrieval", "copy")


def rows(held_out: Callable[[str, int, int], list[Any]]) -> str:
    """Return the content of the file; ``held_out`` is the generator of ``examples/quality``."""
    items = [item for task in TASKS for item in held_out(task, LENGTH, NUM_ITEMS)]
    values = [{"task": i.task, "question": i.content, "answer": i.answer_text} for i in items]
    return "".join(json.dumps(value) + "\n" for value in values)


def load(**_: object) -> dict[str, Dataset]:
    """Return the splits of the data set, read from the file next to this one, not downloaded."""
    from datasets import Dataset

    lines = FILE.read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent / "quality"))
    from tasks import held_out

    FILE.write_text(rows(held_out), encoding="utf-8")

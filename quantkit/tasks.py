"""Task benchmarks through lm-eval (extra `eval`): an opened model, filled in memory, handed to lm-eval's own HF class.

Tasks are lm-eval's, or YAML files in folders of the user's own, whose data may be local files.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantkit.errors import BadInput, UsageError
from quantkit.forward import network, whole
from quantkit.model import Model
from quantkit.scoring import Setting


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    setting: Setting,
    folders: Sequence[Path] = (),
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, float]]:
    """Every task's numbers by metric, as lm-eval states them (`acc`, `acc_stderr` ...).

    Raises UsageError where lm-eval is not installed or knows no such task, BadInput where a task's data are not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        hint = 'pip install "gguf-quantkit[eval]"'
        raise UsageError("tasks need lm-eval, which is not installed", where="--tasks", hint=hint)
    os.environ.setdefault("LOGLEVEL", "ERROR")  # read by lm-eval when it is imported
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    manager = TaskManager(include_path=[str(f) for f in folders] or None)
    if unknown := [t for t in tasks if t not in manager.all_tasks]:
        hint = "name one of `lm-eval ls tasks`, or give its folder with --task-folder"
        raise UsageError(f"lm-eval has no task {unknown[0]!r}", where="--tasks", hint=hint)
    with TemporaryDirectory() as folder:
        for name, text in model.files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    filled = whole(network(model, setting.device, setting.dtype))
    lm = HFLM(pretrained=filled, tokenizer=tokenizer, batch_size=batch, device=str(setting.device))
    try:
        found = simple_evaluate(model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000)
    except (OSError, ValueError, ConnectionError) as e:
        reason = str(e).strip().partition("\n")[0]
        hint = "download them once with network, or point HF_DATASETS_CACHE or the task's data_files at a copy"
        raise BadInput(f"the tasks' data cannot be had ({reason})", where=",".join(tasks), hint=hint) from e
    return {name: _numbers(values) for name, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` as `acc`."""
    return {key.partition(",")[0]: float(v) for key, v in values.items() if isinstance(v, int | float)}

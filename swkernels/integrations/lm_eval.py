"""EleutherAI's lm-eval over a model as it is in memory: patched, edited, quantized, adapted.

``lm_eval`` runs its tasks; ``as_lm`` gives the ``HFLM`` for those who call the library themselves.
Whatever is changed in the model afterwards is what the next call measures. Needs lm-eval.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from torch import nn

from swkernels.detect.samples import evaluating
from swkernels.errors import InvalidInput

_FIGURES = ("results", "groups", "versions", "n-shot", "n-samples", "lm_eval_version")


def as_lm(model: nn.Module, tokenizer, *, batch_size: int = 1, max_length: int | None = None):
    """Return lm-eval's ``HFLM`` of a model.

    Args:
        model: of transformers, or wrapped by PEFT; put into eval mode. ``HFLM`` would tie its
            weights again, too; that is left out, as the model may have been changed on purpose.
        tokenizer: the model's; ``HFLM`` gets a copy, to which it adds a padding token.
        batch_size: sequences that run together.
        max_length: tokens of the longest sequence; None: what lm-eval reads from the model.

    Raises:
        InvalidInput: lm-eval is not installed, or the model is not of transformers.
    """
    _library()
    from lm_eval.models.huggingface import HFLM

    import swkernels.integrations.transformers  # noqa: F401  whose method a config may name

    if batch_size < 1:
        raise InvalidInput(f"batch_size must be at least 1, got {batch_size}")
    if not hasattr(model, "config") or not hasattr(model, "device"):
        raise InvalidInput(f"lm-eval needs a model of transformers, got {type(model).__name__}")
    with _quiet(), _untied(model):
        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
        )


def lm_eval(
    model: nn.Module,
    tokenizer,
    tasks: str | Sequence[str | dict],
    *,
    limit: int | float | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    include_path: str | Path | None = None,
    **options,
) -> dict:
    """Run tasks of lm-eval on a model as it is now: ``lm_eval.simple_evaluate``.

    It seeds the generators of random, NumPy and torch. The model is given back in the modes that
    it had.

    Args:
        model, tokenizer, batch_size, max_length: see ``as_lm``.
        tasks: see ``tasks_of``; a task may also be given as the dictionary of its YAML file.
        limit: the first so many questions of each task, or, below 1, a share of them.
        include_path: a folder with YAML files of more tasks.
        options: of ``lm_eval.simple_evaluate``; ``log_samples`` is off where it is not given.

    Returns:
        What ``simple_evaluate`` returns; ``["results"]`` holds the figures of each task.

    Raises:
        InvalidInput: as ``as_lm`` and ``tasks_of`` do, or a task whose data cannot be loaded.
    """
    wanted = tasks_of(tasks, include_path=include_path)
    from lm_eval import simple_evaluate

    with evaluating(model), _quiet():
        lm = as_lm(model, tokenizer, batch_size=batch_size, max_length=max_length)
        return simple_evaluate(
            lm,
            tasks=wanted,
            limit=limit,
            task_manager=_Loading(_manager_for(wanted, include_path)),
            **({"log_samples": False} | options),
        )


def tasks_of(
    tasks: str | Sequence[str | dict], *, include_path: str | Path | None = None
) -> list[str | dict]:
    """Return tasks as a list, after a look whether lm-eval knows them. Loads no data.

    Args:
        tasks: names with commas between them, or a list of names, paths of YAML files, and
            dictionaries.
        include_path: a folder with YAML files of more tasks.

    Raises:
        InvalidInput: lm-eval is not installed, no task, or one that it does not know.
    """
    _library()
    wanted = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    wanted = [task.strip() if isinstance(task, str) else task for task in wanted]
    if not wanted or "" in wanted:
        raise InvalidInput(
            f"expected the name of a task of lm-eval, such as arc_easy, got {tasks!r:.200}"
        )
    known = _manager_for(wanted, include_path).all_tasks
    for task in wanted:
        if isinstance(task, str) and task not in known and not Path(task).is_file():
            near = difflib.get_close_matches(task, known, 3)
            hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise InvalidInput(f"lm-eval knows no task {task!r:.100}: {hint}")
    return wanted


def figures(results: dict) -> dict:
    """What ``lm_eval`` returned, without times, paths and the machine: twice gives the same."""
    return {key: results[key] for key in _FIGURES if key in results}


def _library():
    try:
        import lm_eval
    except ImportError as error:
        raise InvalidInput(
            "this needs the library lm-eval: pip install 'swkernels[lm-eval]'"
        ) from error
    return lm_eval


def _manager_for(tasks: Sequence[str | dict], include_path: str | Path | None):
    named = any(isinstance(task, str) and not Path(task).is_file() for task in tasks)
    return _manager(named, None if include_path is None else str(include_path))


@lru_cache(maxsize=4)
def _manager(named: bool, include_path: str | None):
    """The index of tasks; that of lm-eval's own, which takes seconds, where one is named."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=named)


class _Loading:
    """A ``TaskManager`` whose failures to load a task are errors that a user can act on."""

    def __init__(self, manager):
        self._manager = manager

    def __getattr__(self, name: str):
        return getattr(self._manager, name)

    def load(self, tasks: list):
        try:
            return self._manager.load(tasks)
        except Exception as error:  # datasets raises many kinds, for the network and formats
            lines = str(error).strip().splitlines() or [type(error).__name__]
            names = [task if isinstance(task, str) else task.get("task") for task in tasks]
            raise InvalidInput(
                f"cannot load {', '.join(map(str, names))} of lm-eval: {lines[0]:.300}; check the "
                "network, or load the data set once where there is one"
            ) from error


@contextmanager
def _untied(model: nn.Module) -> Iterator[None]:
    """Let ``model.tie_weights()`` do nothing."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out lm-eval's remarks on how it is called, errors excepted."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


__all__ = ["as_lm", "figures", "lm_eval", "tasks_of"]

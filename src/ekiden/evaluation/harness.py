"""Tasks of EleutherAI's lm-evaluation-harness on a loaded model: `ekiden evaluate MODEL --harness TASKS`.

The package `lm_eval` brings the tasks, asks the questions and scores the answers; from here it gets the model, the tokenizer
of its folder, and BOS before every text, as in training. `evaluation.comparison` shows what comes back.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ekiden.errors import UsageError, UserError, nearest
from ekiden.export.huggingface import context_length
from ekiden.export.load import LoadedModel
from ekiden.optional import require

_SUFFIXES = (".yaml", ".yml")


class Harness:
    """Tasks that were found, ready to be run on one model after another."""

    def __init__(self, tasks: str, limit: int | None = None, fewshot: int | None = None) -> None:
        """Find the tasks.

        Args:
            tasks: names of tasks, groups or tags, or paths of task files in YAML, separated by commas.
            limit: questions of each task at most; None: all.
            fewshot: solved examples before each question; None: as the task says.

        Raises:
            UserError: `lm_eval` is not installed, or a task file is missing. UsageError: no such task, or a number out
                of range.
        """
        self.tasks = [name.strip() for name in tasks.split(",") if name.strip()]
        if not self.tasks:
            raise UsageError("--harness names no task; give some, as --harness arc_easy,hellaswag")
        for flag, value, least in (("limit", limit, 1), ("fewshot", fewshot, 0)):
            if value is not None and value < least:
                raise UsageError(f"--harness-{flag} must be {least} or more, not {value}")
        self.limit, self.fewshot = limit, fewshot
        _package()
        from lm_eval.tasks import TaskManager

        files = [name for name in self.tasks if name.endswith(_SUFFIXES)]
        # Reading the 10,000 tasks that come with the package takes seconds.
        self.manager = TaskManager(include_defaults=len(files) < len(self.tasks))
        for name in self.tasks:
            if name in files and not Path(name).is_file():
                raise UserError(f"--harness {name} does not exist; give a task file, or the name of a task")
            if name not in files and name not in self.manager.task_index:
                raise UsageError(
                    f"--harness {name} is not a task of lm_eval{nearest(name, self.manager.all_tasks)}; "
                    "`lm-eval ls tasks` lists them"
                )

    def run(self, loaded: LoadedModel, batch_size: int = 8) -> dict[str, Any]:
        """Return the figures of every task, in the task's own metrics.

        Returns:
            {"tasks": {TASK: {"version", "fewshot", "samples", "metrics": {METRIC: {"value", "stderr"}}}}, "lm_eval":
            its version, "limit"}. A group stands among the tasks, without samples of its own. stderr: None where the
            metric has none.

        Raises:
            UserError: a task's data cannot be fetched, or the task fails.
        """
        from lm_eval import __version__, simple_evaluate

        try:
            found = simple_evaluate(
                model=_language_model(loaded, batch_size),
                tasks=list(self.tasks),
                task_manager=self.manager,
                num_fewshot=self.fewshot,
                limit=self.limit,
                log_samples=False,
            )
        except Exception as error:  # whatever a task of somebody else, or the network, makes of it
            text = str(error).strip() or type(error).__name__
            raise UserError(
                f"--harness {','.join(self.tasks)} failed on {loaded.path} ({text.splitlines()[0][:200]}); the tasks' "
                "data come from the hub, so this needs a network or a filled cache (`ekiden --debug` shows more)"
            ) from error
        return {"tasks": _tasks(found or {}), "lm_eval": __version__, "limit": self.limit}


def _package() -> None:
    require("lm_eval", "--harness", extra="harness")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _language_model(loaded: LoadedModel, batch_size: int) -> Any:
    """Return the model as the harness wants it."""
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        """Puts BOS before every text once: before a text that is scored as a whole, the harness does."""

        add_bos_token: bool | None

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            begins, self.add_bos_token = self.add_bos_token, False
            try:
                return list(super().loglikelihood_rolling(requests, disable_tqdm))
            finally:
                self.add_bos_token = begins

    return LanguageModel(
        pretrained=loaded.model,
        tokenizer=tokenizer_with_bos(loaded),
        backend="causal",
        batch_size=batch_size,
        max_length=context_length(loaded.model),
        add_bos_token=loaded.tokenizer.bos_id is not None,
    )


def tokenizer_with_bos(loaded: LoadedModel) -> Any:
    """Return transformers' tokenizer of the model's folder, which puts BOS before a text where there is one.

    Raises:
        UserError: the folder holds no tokenizer that transformers loads.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(loaded.path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{loaded.path} holds no tokenizer that transformers loads ({str(error).splitlines()[0][:120]}); export it "
            "with `ekiden export --format hf` and evaluate that folder"
        ) from None
    number = loaded.tokenizer.bos_id
    if number is not None and tokenizer.is_fast:
        # Ekiden's folders leave BOS to the caller.
        text = tokenizer.convert_ids_to_tokens(number)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{text} $A", special_tokens=[(text, number)]
        )
    return tokenizer


def _tasks(found: Any) -> dict[str, Any]:
    """Return the harness's flat "metric,filter" keys as metrics with their standard errors."""
    tasks: dict[str, Any] = {}
    for task, figures in found.get("results", {}).items():
        metrics: dict[str, dict[str, float | None]] = {}
        for key, value in figures.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            shown = name if kind == "none" else f"{name} ({kind})"
            metrics[shown] = {
                "value": _number(value),
                "stderr": _number(figures.get(f"{name}_stderr,{kind}")),
            }
        samples = found.get("n-samples", {}).get(task, {})
        tasks[task] = {
            "version": found.get("versions", {}).get(task),
            "fewshot": found.get("n-shot", {}).get(task),
            "samples": samples.get("effective"),
            "metrics": metrics,
        }
    return tasks


def _number(value: Any) -> float | None:
    """Return a figure; the harness writes "N/A" where it has none."""
    return float(value) if isinstance(value, int | float) else None

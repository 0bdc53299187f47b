"""Tasks of lm-eval that a training stage asks of its model at its validations, as the stage `benchmark` would."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from models.engine import InferenceEngine
from models.tokenizer import Tokenizer, adds_bos
from models.training.config import TasksConfig, TrainingConfig
from models.training.events import Note
from models.training.state import TaskScore
from models.training.validation import Probe
from tasks import benchmark
from tasks.scores import share
from tasks.stage import Context


def resolved(training: TrainingConfig) -> TrainingConfig:
    """The run with the version of lm-eval, and what tells the data of its tasks, where it asks any.

    Raises UserError for a task that does not exist, and data that are nowhere to be had or not what they were.
    """
    validation = training.validation
    if validation is None or validation.tasks is None:
        return training
    tasks = validation.tasks
    found = [benchmark.resolved(benchmark.Config(task=name, harness=tasks.harness)) for name in tasks.names]
    data = {name: identity for one in found for name, identity in (one.data or {}).items()}
    if tasks.data not in (None, data):
        raise UserError("the data of training.validation.tasks are not what they were; take `data` out of the recipe")
    update = {"tasks": tasks.model_copy(update={"harness": found[0].harness, "data": data})}
    return training.model_copy(update={"validation": validation.model_copy(update=update)})


@contextmanager
def probes(training: TrainingConfig, folder: Path, engine: InferenceEngine, context: Context) -> Iterator[list[Probe]]:
    """What asks a model each of the tasks of a run, within the block; none where it has none. Their requests are made
    here, once.

    `folder`: the tokenizer. `engine`: what is asked; its weights need not be there yet.

    Raises UserError where another version of lm-eval is installed or the data have changed since, for a task that gives
    no share of right answers, and where its texts are nothing for the tokenizer or the model's positions: before the
    training, which would be lost otherwise.
    """
    if training.validation is None or training.validation.tasks is None:
        yield []
        return
    tasks = training.validation.tasks
    tokenizer, bos = Tokenizer(folder), adds_bos(folder)
    context.local_scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=context.local_scratch) as cache:
        made = [_Task(name, tasks, engine, tokenizer, bos, Path(cache, name)) for name in tasks.names]
        for note in (note for task in made for note in task.notes):
            context.report(Note(note))
        yield [task.ask for task in made]


class _Task:
    """A task with its requests, to be asked again and again."""

    def __init__(
        self, name: str, tasks: TasksConfig, engine: InferenceEngine, tokenizer: Tokenizer, bos: bool, cache: Path
    ) -> None:
        self._config = benchmark.Config(task=name, limit=tasks.limit, harness=tasks.harness, data=tasks.data)
        benchmark.check_current(self._config)
        self._task, self.notes = benchmark.load_task(self._config, cache)
        self._metric = _share_of(self._task, name)
        self._task.build_all_requests(limit=tasks.limit)
        # lm-eval makes the requests at each evaluation, with other examples before them than the last time.
        self._task.build_all_requests = self._clear
        self._heed: Callable[[], None] = lambda: None
        batch_tokens = self._config.batch_tokens
        self._asked = benchmark.Asked(engine, tokenizer, bos, batch_tokens, lambda done, total: self._heed())
        self._asked.check(self._task)
        self._chance: float | None = None

    def _clear(self, **options: Any) -> None:
        """Forgets the answers of the last time, behind which lm-eval would put the new ones."""
        for request in self._task.instances:
            request.resps, request.filtered_resps = [], {}

    def ask(self, heed: Callable[[], None]) -> TaskScore:
        """As `models.training.validation.Probe` says."""
        self._heed = heed
        name = self._config.task
        samples = self._asked.evaluate(self._task, self._config.limit, bootstraps=0)["samples"][name]
        if self._chance is None:
            from tasks.harness.results import levels

            self._chance = levels(self._task, samples, self._asked.uniform).chance.get(self._metric)
        own = [sample[self._metric] for sample in samples if sample["filter"] == samples[0]["filter"]]
        score = share(name, self._metric, own, chance=self._chance)
        assert score.value is not None  # lm-eval has no task without documents
        return TaskScore(name, self._metric, score.value, score.standard_error, score.n, score.chance)


def _share_of(task: Any, name: str) -> str:
    """The first of a task's metrics that is a mean over the documents, and the higher the better.

    Raises UserError where it has none.
    """
    from lm_eval.api.metrics import mean

    higher = task.higher_is_better()
    found: Sequence[str] = [metric for metric, made in task.aggregation().items() if made is mean and higher[metric]]
    if not found:
        raise UserError(
            f"training.validation.tasks: '{name}' gives no share of right answers; ask it after the training, with the "
            f"stage benchmark"
        )
    return found[0]

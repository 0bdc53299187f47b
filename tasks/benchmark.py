"""Stage `benchmark`: one task of lm-eval, asked of a model on any engine.

lm-eval makes the requests and the metrics; the engine answers them. Each task is an artifact of its own, so that none
is done again because another was added, and an interrupted evaluation goes on at the task where it stopped.
"""

import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from common.files import canonical_json
from models.engine import Bits, EngineName, Precision, inference_engine
from models.generation import NotFinite
from models.tokenizer import Tokenizer, adds_bos
from models.training.events import Note
from models.weights import whole_pieces
from tasks.checkpoint import read_model, tokenizer_of
from tasks.events import Counted
from tasks.harness.catalogue import definition, harness_version, leaves, task_path, tasks_folder
from tasks.harness.data import check_unchanged, data_sets, identities, offline_first
from tasks.harness.needs import check_defines_examples, check_examples, packages_named, scripts_refused, splits_named
from tasks.scores import RESULTS, SAMPLES
from tasks.stage import Context, Kind, Metrics, Stage

REPORT_SECONDS = 1.0
FEWSHOT_SEED, RANDOM_SEED, NUMPY_SEED = 1234, 0, 1234
"""lm-eval's own defaults, by which examples are drawn and a few tasks shuffle their choices."""
BOOTSTRAPS = 1000
"""Draws behind a standard error that has no formula, such as an F1's; lm-eval's own are 100,000, and these leave
the error itself uncertain by 2%, one in the square root of twice as many."""
_TEMPLATE = ("description", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter")
_UNSAFE = "'{}' runs what a model writes as a program, unfenced, and Cairn does not; `behaviour` asks for programs too"
_RUN_ANSWERS = ("score/math", "slr_bench")
"""Folders of lm-eval's tasks that do so and have no flag that says it: what a model writes goes to SymPy's
`parse_expr`, which evaluates Python, and to a Prolog system."""
_HIDDEN = (
    "'{}' reads {}, which only lm-eval's code names: it is in no key, and where it changes, what was found is reused"
)
_LEVELLED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")


class Config(FrozenModel):
    """What is asked, and with what it is answered."""

    engine: EngineName = "torch"
    """The engine that answers."""
    precision: Precision = "float32"
    """What it computes in."""
    bits: Bits | None = Field(default=None, exclude_if=lambda bits: bits is None)
    """Bits per weight in inference; null for whole weights; MLX alone."""
    task: str = Field(min_length=1)
    """A task of lm-eval by its name, such as `arc_easy`."""
    limit: int | None = Field(default=None, gt=0)
    """Documents that are asked, the first ones; null for all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; null for as many as the task says, and none where it says nothing."""
    bos: bool | None = None
    """Whether <bos> stands before every text; null for as the model's tokenizer does it by itself."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Positions that go through the model at once."""
    trust_remote_code: bool = Field(default=False, exclude_if=lambda trusted: not trusted)
    """Whether metrics may run that the package `evaluate` fetches from the hub as programs; a task that has such a one
    is refused otherwise."""
    harness: str | None = None
    """The version of lm-eval; null for the one that is installed, which then stands here."""
    data: dict[str, str] | None = None
    """What tells the contents of the task's data sets, digest or commit by id; null for those of now."""


def resolved(config: Config) -> Config:
    """The config with the version of lm-eval, and what tells the task's data.

    Raises UserError for a task that does not exist, or has no examples where some are wanted, and data that are
    nowhere to be had.
    """
    version = harness_version()
    if config.harness is not None and config.harness != version:
        raise UserError(f"the task is of lm-eval {config.harness}, and lm-eval {version} is installed")
    (leaf, *more) = leaves([config.task])
    if more or leaf.name != config.task:
        members = ", ".join(member.name for member in (leaf, *more)[:6])
        raise UserError(f"'{config.task}' is a group of tasks ({members}, …); a stage asks one of them")
    path = task_path(config.task)
    described = definition(path)
    if described.get("unsafe_code") or any(path.is_relative_to(tasks_folder() / one) for one in _RUN_ANSWERS):
        raise UserError(_UNSAFE.format(config.task))
    check_defines_examples(described, config.task, config.num_fewshot)
    try:
        data = identities(data_sets(described, path.parent))
    except UserError as error:
        raise UserError(f"{config.task}: {error}") from error
    if config.data is not None and config.data != data:
        raise UserError(f"the data of '{config.task}' are not what they were; take `data` out of the recipe")
    return config.model_copy(update={"harness": version, "data": data})


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `results.json` and `samples.parquet` with every prompt, target, answer and its log-probabilities.

    Raises UserError for a task whose answers would be run as programs, for one that is scored by a program that has to
    be fetched, and for one of pictures; where another version of lm-eval is installed or the data have changed since;
    and NotFinite where what the model says is not.
    """
    check_current(config)
    model = read_model(inputs["model"])
    tokenizer = tokenizer_of(inputs["model"], model.config)
    bos = adds_bos(inputs["model"] / "tokenizer") if config.bos is None else config.bos
    engine = inference_engine(
        config.engine, model.config, config.precision, whole_pieces(model.weights), bits=config.bits
    )
    watch = _watch(config.task, context)
    asked = Asked(engine, tokenizer, bos, config.batch_tokens, watch, config.trust_remote_code)
    context.local_scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=context.local_scratch) as cache:
        task, notes = load_task(config, Path(cache))
        for note in notes:
            context.report(Note(note))
        try:
            found = asked.evaluate(task, config.limit)
        except NotFinite as error:
            raise NotFinite(f"the model '{context.labels.get('model', context.name)}'") from error
        told = {"notes": notes} if notes else {}
        return _written(config, context, task, found, asked, bos) | {"device": engine.device, **told}


def _written(
    config: Config, context: Context, task: Any, found: Mapping[str, Any], asked: "Asked", bos: bool
) -> Metrics:
    """Writes the files of a finished evaluation, and gives its metrics. `found`: what lm-eval gave."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.harness.results import levels, sample_columns, scores, told

    samples = found["samples"][config.task]
    floor = levels(task, samples, asked.uniform)
    made = scores(
        config.task,
        {**found["results"][config.task], "higher_is_better": found["higher_is_better"][config.task]},
        samples,
        floor,
    )
    columns = sample_columns(task, samples)
    pq.write_table(pa.table(columns), context.output / SAMPLES, compression="zstd")
    results: dict[str, Any] = {
        "measure": "benchmark",
        "task": config.task,
        "task_version": found["versions"][config.task],
        "lm_eval": harness_version(),
        "data": config.data or {},
        "n": len(columns["id"]),
        "limit": config.limit,
        "num_fewshot": task.get_config("num_fewshot"),
        "template": {key: value for key in _TEMPLATE if (value := _definition(config).get(key)) is not None},
        "bos": bos,
        "precision": config.precision,
        **config.model_dump(include={"bits"}),  # nothing where it is null
        "truncated": asked.truncated,
        "scores": [score.dumped() for score in made],
    }
    (context.output / RESULTS).write_bytes(canonical_json(results))
    if asked.truncated:
        context.report(Note(f"{asked.truncated:,} requests were longer than the model and lost their beginning"))
    return {"summary": ", ".join(told(made)), **results}


def check_current(config: Config) -> None:
    """Raises UserError where another version of lm-eval is installed, or the data have changed since."""
    version = harness_version()
    if config.harness not in (None, version):
        raise UserError(f"the stage wants lm-eval {config.harness}, and this machine has {version}")
    check_unchanged(config.data or {})


def _definition(config: Config) -> dict[str, Any]:
    return definition(task_path(config.task))


def load_task(config: Config, cache: Path) -> tuple[Any, list[str]]:
    """lm-eval's task, with its data, and the random numbers that it draws from here on seeded as lm-eval seeds them;
    and what there is to say of its data, a sentence each.

    `cache`: a folder for what `datasets` keeps, which nobody has used with other seeds, for it would give again what
    they had shuffled; the task reads from it as long as it is asked.

    Raises UserError for data, packages and examples that are not there, and for a task that Cairn does not ask.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    # Below that are remarks on defaults that its own tasks rely on.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Before the data are loaded, since some tasks shuffle them then.
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    data, name = config.data or {}, config.task
    with (
        packages_named(name),
        scripts_refused(name, config.trust_remote_code),
        splits_named(name, _definition(config)),
        offline_first(data, cache) as read,
    ):
        loaded = TaskManager(include_defaults=False).load([str(task_path(name))])
    task = loaded["tasks"][name]
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(_UNSAFE.format(name))
    if getattr(task, "MULTIMODAL", False) or task.OUTPUT_TYPE not in _LEVELLED:
        raise UserError(f"'{name}' asks for more than text ({task.OUTPUT_TYPE})")
    # lm-eval shows no examples before texts that are scored whole.
    own = 0 if task.OUTPUT_TYPE == "loglikelihood_rolling" else task.get_config("num_fewshot")
    # As lm-eval has it: a task that says 0 means it.
    wanted = own if own == 0 or config.num_fewshot is None else config.num_fewshot
    task.set_config(key="num_fewshot", value=wanted or 0)
    check_examples(task, name)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    hidden = dict.fromkeys(one for one in read if one not in data)
    return task, [_HIDDEN.format(name, ", ".join(hidden) or "its data")] if hidden or not data else []


class Asked:
    """lm-eval's side of a model: made here, since a recipe is loaded where lm-eval need not be."""

    def __init__(
        self,
        engine: Any,
        tokenizer: Tokenizer,
        bos: bool,
        batch_tokens: int,
        watch: Callable[[int, int], None],
        trust_remote_code: bool = False,
    ) -> None:
        from tasks.harness.adapter import HarnessModel

        self._model = HarnessModel(engine, tokenizer, bos, batch_tokens, watch)
        self._vocab_size = engine.config.vocab_size
        self._trust_remote_code = trust_remote_code

    @property
    def truncated(self) -> int:
        return self._model.truncated

    def check(self, task: Any) -> None:
        """Raises UserError where a request of a task that has made them cannot be answered, whatever the weights."""
        for request in task.instances:
            self._model.check(request)

    def evaluate(self, task: Any, limit: int | None, bootstraps: int = BOOTSTRAPS) -> dict[str, Any]:
        """lm-eval's results of a task, with its samples; `bootstraps` 0 leaves all standard errors out."""
        from lm_eval.evaluator import evaluate

        name = task.config.task
        with packages_named(name), scripts_refused(name, self._trust_remote_code):
            found = evaluate(
                self._model, {"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=bootstraps
            )
        assert found is not None
        return dict(found)

    def uniform(self, text: str) -> float:
        """The log-probability of a text whose tokens are all equally likely."""
        return -len(self._model.tok_encode(text)) * math.log(self._vocab_size)


def _watch(name: str, context: Context) -> Callable[[int, int], None]:
    told = time.monotonic()
    started = told

    def watch(done: int, total: int) -> None:
        nonlocal told
        if context.should_stop():
            raise StageInterrupted(f"the benchmark {name} was stopped")
        now = time.monotonic()
        if now - told > REPORT_SECONDS or done == total:
            told = now
            context.report(Counted(name, done, total, "requests", now - started))

    return watch


STAGE = Stage(
    name="benchmark",
    # 2: levels and what a sample says of what was chosen, since 1.
    version=2,
    config=Config,
    inputs={"model": Kind.MODEL},
    output=Kind.EVALUATION,
    run=run,
    resolved=resolved,
)

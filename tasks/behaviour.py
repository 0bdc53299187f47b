"""Stage `behaviour`: questions of many categories, answered by greedy generation and scored by programs."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pydantic import Field

from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from common.files import canonical_json
from models.chat import Chat, Message, Template, chat_of
from models.engine import Bits, EngineName, InferenceEngine, Precision, inference_engine
from models.generation import NotFinite, generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer
from models.training.events import Note
from models.weights import whole_pieces
from tasks.asking.answers import Python
from tasks.asking.programs import works
from tasks.asking.questions import Category, Question, chosen_categories, read_category, suite_digest
from tasks.asking.sandbox import check_sandbox
from tasks.asking.scorers import is_right
from tasks.checkpoint import read_model, tokenizer_of
from tasks.scores import RESULTS, SAMPLES, share, wilson
from tasks.stage import Context, Kind, Metrics, Stage

BEHAVIOUR, CORRECT = "behaviour", "correct"
BEFORE, BEHIND = "Question: ", "\nAnswer:"
"""What stands around a question to a model whose tokenizer has no chat template."""
REPORT_SECONDS = 10.0
_ENDS = re.compile(rf"\n\s*\n|\n{BEFORE.strip()}")


class Config(FrozenModel):
    """What a model is asked, and with what."""

    engine: EngineName = "torch"
    """The engine that generates."""
    precision: Precision = "float32"
    """What it computes in."""
    bits: Bits | None = None
    """Bits per weight in inference; null for whole weights; MLX alone."""
    categories: tuple[str, ...] = ()
    """The categories that are asked; empty for all."""
    template: Template | None = None
    """How a model is asked whose tokenizer has no chat template; null for as a text, `Question: …` and `Answer:` in two
    lines, whose answer ends at a blank line or at the next question. <bos> comes first either way."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Tokens after which an answer is cut off; what is there is scored."""
    batch_size: int = Field(default=64, gt=0)
    """Questions that are answered at once."""
    shown_samples: int = Field(default=10, ge=0)
    """Answers that are shown, spread over the categories; all of them are kept."""
    suite: str | None = None
    """The digest of the categories' files, which is found when the recipe is loaded."""


class Asked(NamedTuple):
    """A question of a category."""

    category: Category
    question: Question


class Asking:
    """How a model is asked: the ids before an answer, and the text of an answer's ids."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat | None) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self.stops = {*tokenizer.stop_ids, *(() if chat is None else (chat.closing_id,))}
        """The ids that end an answer."""

    @property
    def template(self) -> str:
        """A prompt as text, `{ask}` in place of the question."""
        if self._chat is None:
            return f"{self._tokenizer.backend.id_to_token(self._tokenizer.bos_id)}{BEFORE}{{ask}}{BEHIND}"
        return "".join(part.text for part in self._chat.rendered([_message("{ask}")], generation_prompt=True))

    def prompt(self, ask: str) -> list[int]:
        """The ids that an answer goes on from. Raises UserError for what the tokenizer cannot represent."""
        if self._chat is None:
            return [self._tokenizer.bos_id, *self._tokenizer.encode(f"{BEFORE}{ask}{BEHIND}")]
        return self._chat.prompt_ids([_message(ask)])

    def ended(self, answer: Sequence[int]) -> bool:
        """Whether an answer is at its end: at a stop or, in a text, where something else begins."""
        if answer and answer[-1] in self.stops:
            return True
        return self._chat is None and _ENDS.search(self._tokenizer.decode(answer).strip()) is not None

    def said(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """What an answer says: of a text, what stands before a blank line or another question."""
        if self._chat is not None:
            return self._chat.answer(answer)
        return first_answer(self._tokenizer.decode_after(prompt, answer))


def _message(ask: str) -> Message:
    return {"role": "user", "content": ask}


def first_answer(text: str) -> str:
    """What stands in a text before the first blank line behind something, or before the next question."""
    return _ENDS.split(text.strip(), maxsplit=1)[0].strip()


def resolved(config: Config) -> Config:
    """The config with the digest of its categories' files. Raises UserError where there is no such category, and where
    the files are not those of a digest that it has."""
    found = suite_digest(config.categories)
    if config.suite not in (None, found):
        raise UserError(f"the questions here have the digest {found[:12]}…, and suite asks for {config.suite[:12]}…")
    return config.model_copy(update={"suite": found})


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `results.json` with a score per category and one for the whole, and `samples.parquet` with every answer.

    A question that is longer than the model's positions counts as wrong. Answers that hold a program are run in the
    sandbox of tasks.asking. Raises UserError for categories that are not there or are others than when the recipe was
    loaded, where there are programs to run and the machine has no sandbox, for questions that the tokenizer cannot
    represent; and NotFinite where what the model says is not.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = resolved(config)
    categories = [read_category(path) for path in chosen_categories(config.categories).values()]
    asked = [Asked(category, question) for category in categories for question in category.questions]
    if any(isinstance(one.question.answer, Python) for one in asked):
        check_sandbox()
    model = read_model(inputs["model"])
    tokenizer = tokenizer_of(inputs["model"], model.config)
    asking = Asking(tokenizer, _chat(config, inputs["model"] / "tokenizer", tokenizer))
    prompts = [asking.prompt(one.question.ask) for one in asked]
    engine = inference_engine(
        config.engine, model.config, config.precision, whole_pieces(model.weights), bits=config.bits
    )
    watch = _watcher(context, len(asked))
    try:
        answers = _answers(engine, prompts, config, asking, watch)
    except NotFinite as error:
        raise NotFinite(f"the model '{context.labels.get('model', context.name)}'") from error
    said = ["" if ids is None else asking.said(prompt, ids) for prompt, ids in zip(prompts, answers, strict=True)]
    correct = _scored(asked, said, watch)
    columns = _columns(asked, said, correct)
    pq.write_table(pa.table(columns), context.output / SAMPLES, compression="zstd")
    results = {
        "measure": BEHAVIOUR,
        "template": asking.template,
        **config.model_dump(mode="json", include={"suite", "precision", "bits", "max_new_tokens"}),
        **_summarised(categories, asked, correct),
        "cut_off": sum(ids is not None and not asking.ended(ids) for ids in answers),
        "too_long": sum(ids is None for ids in answers),
        "samples": _shown(columns, config.shown_samples),
    }
    (context.output / RESULTS).write_bytes(canonical_json(results))
    return {"summary": _summary(results), **results, "device": engine.device}


def _chat(config: Config, folder: Path, tokenizer: Tokenizer) -> Chat | None:
    own = chat_of(folder)
    return own if own is not None or config.template is None else Chat(tokenizer, config.template, bos=True)


def _watcher(context: Context, questions: int) -> Callable[[str, int], None]:
    """Takes what is being done and how many questions it is done for; raises StageInterrupted when told to stop."""
    told = time.monotonic()

    def watch(what: str, done: int) -> None:
        nonlocal told
        if context.should_stop():
            raise StageInterrupted("the questions were stopped")
        if time.monotonic() - told > REPORT_SECONDS:
            told = time.monotonic()
            context.report(Note(f"{done:,} of {questions:,} questions {what}"))

    return watch


def _answers(
    engine: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    config: Config,
    asking: Asking,
    watch: Callable[[str, int], None],
) -> list[list[int] | None]:
    """The ids that the model goes on with, with what ends them; None for a prompt that is too long."""
    longest = engine.config.max_position_embeddings
    fitting = [number for number, prompt in enumerate(prompts) if len(prompt) <= longest]
    # Neighbours of equal length waste no padding.
    fitting.sort(key=lambda number: -len(prompts[number]))
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)
    answers: list[list[int] | None] = [None] * len(prompts)
    for start in range(0, len(fitting), config.batch_size):
        watch("answered", start)
        batch = fitting[start : start + config.batch_size]
        written = generate(
            engine, [prompts[number] for number in batch], sampling, asking.stops, config.batch_size, asking.ended
        )
        for number, answer in zip(batch, written, strict=True):
            answers[number] = answer
    return answers


def _scored(asked: Sequence[Asked], said: Sequence[str], watch: Callable[[str, int], None]) -> list[bool]:
    """Whether each answer is right."""
    correct = []
    for done, ((_, question), text) in enumerate(zip(asked, said, strict=True)):
        watch("scored", done)
        answer = question.answer
        correct.append(works(answer.python, text) if isinstance(answer, Python) else is_right(answer, text))
    return correct


def _columns(asked: Sequence[Asked], said: Sequence[str], correct: Sequence[bool]) -> dict[str, list[Any]]:
    """What `samples.parquet` has."""
    return {
        "id": [category.identity(question) for category, question in asked],
        "category": [category.category for category, _ in asked],
        "scorer": [question.scorer for _, question in asked],
        "prompt": [question.ask for _, question in asked],
        "target": [question.answer.described for _, question in asked],
        "prediction": list(said),
        CORRECT: list(correct),
    }


def _shown(columns: Mapping[str, Sequence[Any]], number: int) -> list[dict[str, Any]]:
    """Some of the answers, as far apart as can be: neighbours are of one category."""
    rows = len(columns["id"])
    number = min(number, rows)
    chosen = (place * rows // number for place in range(number))
    names = ("category", "prompt", "target", "prediction", CORRECT)
    return [{name: columns[name][row] for name in names} for row in chosen]


def _summarised(categories: Sequence[Category], asked: Sequence[Asked], correct: Sequence[bool]) -> dict[str, Any]:
    """The scores, and beside them the counts, with intervals that hold for few questions too."""
    chances = [category.chance_of(question) for category, question in asked]
    scores, groups = [share(BEHAVIOUR, CORRECT, correct, chance=fmean(chances))], []
    for category in categories:
        mine = [number for number, one in enumerate(asked) if one.category is category]
        found, chance = [correct[number] for number in mine], fmean(chances[number] for number in mine)
        scores.append(share(BEHAVIOUR, CORRECT, found, group=category.category, chance=chance))
        groups.append({"category": category.category, "kind": category.kind, **_counted(found)})
    return {**_counted(correct), "categories": groups, "scores": [score.dumped() for score in scores]}


def _counted(correct: Sequence[bool]) -> dict[str, Any]:
    return {"n": len(correct), CORRECT: sum(correct), "interval": list(wilson(sum(correct), len(correct)))}


def _summary(results: Mapping[str, Any]) -> str:
    low, high = results["interval"]
    parts = [
        f"{results[CORRECT]:,} of {results['n']:,} questions right, {results[CORRECT] / results['n']:.1%} "
        f"({low:.1%} to {high:.1%})",
        *([f"{results['cut_off']:,} answers cut off"] if results["cut_off"] else []),
        *([f"{results['too_long']:,} questions longer than the model's positions"] if results["too_long"] else []),
    ]
    return ", ".join(parts)


STAGE = Stage(
    name="behaviour",
    version=2,
    config=Config,
    inputs={"model": Kind.MODEL},
    output=Kind.EVALUATION,
    run=run,
    resolved=resolved,
)

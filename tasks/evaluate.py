"""Stage `evaluate`: exact match by greedy generation over a whole split, and whether calculator marks are right."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError
from common.files import canonical_json
from models.chat import Chat, Template, chat_of
from models.engine import Bits, EngineName, InferenceEngine, Precision, inference_engine
from models.generation import NotFinite, generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer
from models.weights import whole_pieces
from tasks.calculator import FINAL, OPEN, final_number, marks_in
from tasks.checkpoint import read_model, tokenizer_of
from tasks.documents import data_of
from tasks.exact_match import METRIC, grouped, grouping_columns, scores, summarise
from tasks.questions import Questions, problem_id, read_questions
from tasks.scores import RESULTS, SAMPLES
from tasks.stage import Context, Kind, Metrics, Stage

TEXT_TOKENS, CHAT_TOKENS = 16, 256
"""Tokens that an answer may have where nobody says: that of a text, which is a sum, and that of a conversation."""


class Config(FrozenModel):
    """What is evaluated, and with what."""

    engine: EngineName = "torch"
    """The engine that generates."""
    precision: Precision = "float32"
    """What it computes in."""
    # Null stands in no key: what was measured before there were bits counts as it did.
    bits: Bits | None = Field(default=None, exclude_if=lambda bits: bits is None)
    """Bits per weight in inference; null for whole weights; MLX alone."""
    split: Literal["train", "validation", "test"] = "test"
    """The split of the documents."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """Tokens after which an answer is cut off and counts as wrong; null for 16 where the documents are texts, and 256
    where they are conversations."""
    batch_size: int = Field(default=1024, gt=0)
    """Prompts that are generated for at once."""
    # Null stands in no key, as above.
    template: Template | None = Field(default=None, exclude_if=lambda template: template is None)
    """How a model is asked whose tokenizer has no chat template, where the documents are conversations; <bos>, or what
    stands for it, comes first."""
    by: tuple[str, ...] | None = None
    """What exact match is told by: columns of the documents, and, read from a problem's text, `operator` and `digits`
    (of the longest operand). Null for what there is of these two and the column `phrasing`."""
    shown_samples: int = Field(default=10, ge=0)
    """Predictions that are shown; all of them are kept."""


class Encoded(NamedTuple):
    """A problem as tokens."""

    prompt: list[int]
    answer: list[int]
    """What the model has to write, with the token that closes it."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `results.json`, with standard errors and 95% intervals, and `samples.parquet` with every prompt, target
    and prediction.

    Documents with the column `messages` are asked as conversations: the last answer is the target. A prompt that is
    longer than the model's positions counts as wrong, and so does an answer that did not end: `cut_off` counts these.
    Raises UserError for documents without prompts, targets or a column that is named, for conversations where the
    model's tokenizer has no template and the config names none, and for a model whose logits are not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    questions = read_questions(inputs["documents"], config.split, config.by)
    by = grouping_columns(config.by, questions.prompts, questions.targets, questions.columns)
    model = read_model(inputs["model"])
    tokenizer = tokenizer_of(inputs["model"], model.config)
    chat = None if questions.conversations is None else _chat(config, inputs["model"] / "tokenizer", tokenizer)
    encoded = _encoded(questions, tokenizer, chat)
    engine = inference_engine(
        config.engine, model.config, config.precision, whole_pieces(model.weights), bits=config.bits
    )
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=_limit(config, questions))
    stops = {*tokenizer.stop_ids, *(() if chat is None else (chat.closing_id,))}
    try:
        answers = _answers(engine, encoded, sampling, stops, config.batch_size)
    except NotFinite as error:
        raise NotFinite(f"the model '{context.labels.get('model', context.name)}'") from error
    # Tokens, not text: decoding leaves special tokens out, and an answer that did not end is not the answer.
    correct = [answer == problem.answer for answer, problem in zip(answers, encoded, strict=True)]
    predictions = [
        tokenizer.decode_after(problem.prompt, answer or []) if chat is None else chat.answer(answer or [])
        for problem, answer in zip(encoded, answers, strict=True)
    ]
    columns: dict[str, Sequence[Any]] = {
        "prompt": questions.prompts,
        "target": questions.targets,
        "prediction": predictions,
        "correct": correct,
    }
    ids = [problem_id(*problem) for problem in zip(questions.prompts, questions.targets, strict=True)]
    metric = {METRIC: [int(right) for right in correct]}
    pq.write_table(pa.table({"id": ids, **columns, **metric}), context.output / SAMPLES, compression="zstd")
    shown = min(config.shown_samples, len(encoded))
    results = {
        "split": config.split,
        **config.model_dump(include={"bits"}),  # nothing where it is null
        **({} if chat is None else {"template": chat.template}),
        **_scored(questions.targets, correct, by, data_of(inputs["documents"])),
        "max_new_tokens": sampling.max_new_tokens,
        **_unanswered(answers, stops),
        **marks_summary(questions.targets, predictions),
        "samples": [{name: column[row] for name, column in columns.items()} for row in range(shown)],
    }
    (context.output / RESULTS).write_bytes(canonical_json(results))
    return {"summary": _summary(results), **results, "device": engine.device}


def _answers(
    engine: InferenceEngine,
    problems: Sequence[Encoded],
    sampling: SamplingConfig,
    stops: Collection[int],
    batch_size: int,
) -> list[list[int] | None]:
    """What the model writes on each problem; None where the prompt is longer than its positions."""
    longest = engine.config.max_position_embeddings
    fitting = [row for row, problem in enumerate(problems) if len(problem.prompt) <= longest]
    written = generate(engine, [problems[row].prompt for row in fitting], sampling, stops, batch_size)
    answers: list[list[int] | None] = [None for _ in problems]
    for row, answer in zip(fitting, written, strict=True):
        answers[row] = answer
    return answers


def _unanswered(answers: Sequence[list[int] | None], stops: Collection[int]) -> dict[str, int]:
    """How many answers did not end, and, where there are any, how many prompts are too long to be answered."""
    too_long = sum(answer is None for answer in answers)
    cut_off = sum(answer is not None and (not answer or answer[-1] not in stops) for answer in answers)
    return {"cut_off": cut_off, **({"too_long": too_long} if too_long else {})}


def _scored(
    targets: Sequence[str],
    correct: Sequence[bool],
    by: Mapping[str, Sequence[Any]],
    data: Mapping[str, str | None],
) -> dict[str, Any]:
    """What the results say of exact match. The task is called after the data, where that has a name."""
    summary, groups = summarise(targets, correct), grouped(by, correct)
    found = scores(", ".join(data) or METRIC, summary, groups)
    return {"data": data, **summary, "groups": groups, "scores": [score.dumped() for score in found]}


def _limit(config: Config, questions: Questions) -> int:
    """Tokens after which an answer is cut off."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    return TEXT_TOKENS if questions.conversations is None else CHAT_TOKENS


def _chat(config: Config, folder: Path, tokenizer: Tokenizer) -> Chat:
    """The tokenizer's own template, or the config's. Raises UserError where neither has one."""
    own = chat_of(folder)
    if own is not None:
        return own
    if config.template is None:
        raise UserError(
            "the documents are conversations, and the model's tokenizer has no chat template: name the one to ask it "
            "with, template: plain or chatml"
        )
    return Chat(tokenizer, config.template, bos=True)


def _encoded(questions: Questions, tokenizer: Tokenizer, chat: Chat | None) -> list[Encoded]:
    if chat is None or questions.conversations is None:
        parts = tokenizer.encode_parts(questions.prompts, questions.targets)
        return [Encoded([tokenizer.bos_id, *prompt], [*target, tokenizer.text_eos_id]) for prompt, target in parts]
    found = []
    for messages in questions.conversations:
        prompt = chat.prompt_ids(messages[:-1])
        ids, counted = chat.conversation(messages)
        answer = [token for token, counts in zip(ids[len(prompt) :], counted[len(prompt) :], strict=True) if counts]
        found.append(Encoded(prompt, answer))
    return found


def _summary(results: Mapping[str, Any]) -> str:
    parts = [f"exact match {results['exact_match']:.2%} of {results['n']:,}"]
    if "marks" in results:
        parts.append(f"well-formed marks {results['marks']['well_formed']:.2%}")
    if results["cut_off"]:
        parts.append(f"{results['cut_off']:,} answers cut off")
    if "too_long" in results:
        parts.append(f"{results['too_long']:,} prompts longer than the model's positions")
    return ", ".join(parts)


def marks_summary(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
    """What `marks` has: over the problems whose target has calculator marks, the share of predictions in which they are
    well-formed (see tasks.calculator), in which they are well-formed and all right, and whose final number is the
    target's. Nothing where no target has any."""
    pairs = [pair for pair in zip(targets, predictions, strict=True) if OPEN in pair[0]]
    if not pairs:
        return {}
    read = [marks_in(prediction) for _, prediction in pairs]
    shares = {
        "well_formed": sum(marks is not None for marks in read),
        "right": sum(marks is not None and all(mark.right for mark in marks) for marks in read),
        "final_number": sum(_same_final_number(*pair) for pair in pairs),
    }
    return {"marks": {"n": len(pairs), **{name: count / len(pairs) for name, count in shares.items()}}}


def _same_final_number(target: str, prediction: str) -> bool:
    wanted = final_number(target)
    # Where #### stands before the target's, it has to in the prediction: any last number might be right by chance.
    if wanted is None or (FINAL in target and FINAL not in prediction):
        return False
    return final_number(prediction) == wanted


STAGE = Stage(
    name="evaluate",
    version=4,
    config=Config,
    inputs={"model": Kind.MODEL, "documents": Kind.DOCUMENTS},
    output=Kind.EVALUATION,
    run=run,
)

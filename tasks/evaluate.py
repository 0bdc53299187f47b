"""Stage `evaluate`: exact match by greedy generation over a whole split, and whether calculator marks are right."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError, suggestion
from common.files import canonical_json, sha256_bytes
from models.chat import Chat, Message, Template, chat_of
from models.engine import Bits, EngineName, Precision, inference_engine
from models.generation import NotFinite, generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer
from models.weights import whole_pieces
from tasks.calculator import FINAL, OPEN, final_number, marks_in
from tasks.checkpoint import read_model, tokenizer_of
from tasks.corpus.conversations import CHOSEN, MESSAGES, REJECTED, parsed
from tasks.corpus.sources import SPLITS
from tasks.documents import data_of
from tasks.exact_match import BY_DEFAULT, METRIC, READ, grouped, grouping_columns, scores, summarise
from tasks.scores import RESULTS, SAMPLES
from tasks.stage import Context, Kind, Metrics, Stage

ID_DIGITS = 16
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


class Questions(NamedTuple):
    """What a model is asked."""

    prompts: list[str]
    """As people read them: of a conversation, what is said before the last answer, a line each."""
    targets: list[str]
    """What it has to answer."""
    conversations: list[list[Message]] | None
    """Whole conversations, of which each target is the last answer; None where prompts are texts to go on with."""
    columns: dict[str, list[Any]]
    """The columns of the documents that exact match is told by."""


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
    fitting = [row for row, (prompt, _) in enumerate(encoded) if len(prompt) <= model.config.max_position_embeddings]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=_limit(config, questions))
    stops = {*tokenizer.stop_ids, *(() if chat is None else (chat.closing_id,))}
    try:
        written = generate(engine, [encoded[row].prompt for row in fitting], sampling, stops, config.batch_size)
    except NotFinite as error:
        raise NotFinite(f"the model '{context.labels.get('model', context.name)}'") from error
    answers: list[list[int]] = [[] for _ in encoded]
    for row, answer in zip(fitting, written, strict=True):
        answers[row] = answer
    cut_off = sum(not answer or answer[-1] not in stops for answer in written)
    # Tokens, not text: decoding leaves special tokens out, and an answer that did not end is not the answer.
    correct = [answer == problem.answer for answer, problem in zip(answers, encoded, strict=True)]
    predictions = [
        tokenizer.decode_after(problem.prompt, answer) if chat is None else chat.answer(answer)
        for problem, answer in zip(encoded, answers, strict=True)
    ]
    columns: dict[str, list[Any]] = {
        "prompt": questions.prompts,
        "target": questions.targets,
        "prediction": predictions,
        "correct": correct,
    }
    ids = [problem_id(*problem) for problem in zip(questions.prompts, questions.targets, strict=True)]
    metric = {METRIC: [int(right) for right in correct]}
    pq.write_table(pa.table({"id": ids, **columns, **metric}), context.output / SAMPLES, compression="zstd")
    summary, groups, data = summarise(questions.targets, correct), grouped(by, correct), data_of(inputs["documents"])
    results = {
        "split": config.split,
        "data": data,
        **config.model_dump(include={"bits"}),  # nothing where it is null
        **({} if chat is None else {"template": chat.template}),
        **summary,
        "groups": groups,
        "scores": [score.dumped() for score in scores(", ".join(data) or METRIC, summary, groups)],
        "max_new_tokens": sampling.max_new_tokens,
        "cut_off": cut_off,
        **({"too_long": len(encoded) - len(fitting)} if len(fitting) < len(encoded) else {}),
        **marks_summary(questions.targets, predictions),
        "samples": [
            {name: column[row] for name, column in columns.items()}
            for row in range(min(config.shown_samples, len(encoded)))
        ],
    }
    (context.output / RESULTS).write_bytes(canonical_json(results))
    return {"summary": _summary(results), **results, "device": engine.device}


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


def problem_id(prompt: str, target: str) -> str:
    """What a problem is called, the same for every model: the first digits of the SHA-256 of prompt and target."""
    return sha256_bytes(canonical_json([prompt, target]))[:ID_DIGITS]


def read_questions(documents: Path, split: str, by: Sequence[str] | None = ()) -> Questions:
    """The problems of a split: conversations where it has messages. Raises UserError where there are none, and for a
    column that they are told by and have not."""
    import pyarrow.parquet as pq

    prompts: list[str] = []
    targets: list[str] = []
    conversations: list[list[Message]] = []
    kept: dict[str, list[Any]] = {}
    for path in sorted(documents.glob(f"{split}-*.parquet")):
        file = pq.ParquetFile(path)
        columns = file.schema_arrow.names
        problem = unaskable(columns)
        if problem is not None:
            raise UserError(f"the documents {problem}")
        wanted = _wanted(by, columns)
        table = file.read(list({MESSAGES, "prompt", "target", *wanted} & {*columns}))
        for name in wanted:
            kept.setdefault(name, []).extend(table[name].to_pylist())
        if MESSAGES in columns:
            for row, text in enumerate(table[MESSAGES].to_pylist()):
                conversations.append(_conversation(text, f"{path.name}, row {row}"))
            continue
        prompts += table["prompt"].to_pylist()
        targets += table["target"].to_pylist()
    if conversations:
        prompts = ["\n".join(message["content"] for message in messages[:-1]) for messages in conversations]
        targets = [messages[-1]["content"] for messages in conversations]
    if not prompts:
        raise UserError(f"the documents {no_split(split, (path.name for path in documents.iterdir()))}")
    return Questions(prompts, targets, conversations or None, kept)


def _wanted(by: Sequence[str] | None, columns: Collection[str]) -> list[str]:
    """The columns that exact match is told by, of those that the documents have."""
    for name in by or ():
        if name not in columns and name not in READ:
            raise UserError(f"by: the documents have no column '{name}'{suggestion(name, {*READ, *columns})}")
    return [name for name in (BY_DEFAULT if by is None else by) if name in columns]


def unaskable(columns: Collection[str]) -> str | None:
    """Why documents with such columns cannot be asked, to be said of them; None where they can."""
    if {MESSAGES, CHOSEN, REJECTED} <= set(columns):
        return "are preferences, of which neither answer is one to be met; exact match needs conversations or problems"
    if MESSAGES in columns:
        return None
    missing = [name for name in ("prompt", "target") if name not in columns]
    return f"have no column '{missing[0]}'; exact match needs prompts and targets" if missing else None


def no_split(split: str, files: Iterable[str]) -> str:
    """That documents with such files lack a split, to be said of them, and which others they have."""
    splits = {name.partition("-")[0] for name in files} - {split}
    others = " and ".join(one for one in SPLITS if one in splits)
    return f"have no {split} split to evaluate" + (f"; they have {others}" if others else "")


def _conversation(text: str, place: str) -> list[Message]:
    """The messages in a cell. Raises UserError where they are no conversation that ends with an answer."""
    try:
        return parsed(text)
    except UserError as error:
        raise UserError(f"the documents hold no conversation in {place} ({error}); make them again") from error


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

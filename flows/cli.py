"""The command `cairn`.

Nothing heavy is imported here: PyTorch, Prefect and pyarrow come with the commands that need them.
"""

import logging
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from artifacts import collect
from artifacts.collect import DEFAULT_GRACE
from artifacts.store import Store
from common.errors import StageFailed, StageInterrupted, UserError
from models.machine import Hardware

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Trains small language models as a pipeline of stages.",
)
console = Console()
errors = Console(stderr=True)

# Prefect reads these when it is imported; what the user has set stays.
PREFECT_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # A server that `cairn deploy` has told of Cairn takes runs for crashed that are silent for longer.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}
QUIET = {
    # Its log lines would garble the progress bar; errors are reported here.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name (see `cairn recipes`) or a YAML file's path.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Overrides a key of the recipe; may be given several times."),
]
RefArgument = Annotated[
    str,
    typer.Argument(help="A name such as models/arithmetic@base, or the start of a key or digest."),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name such as models/arithmetic@base, the start of a key or digest, or a folder or hub id such as "
        "published/arithmetic or openai-community/gpt2.",
    ),
]
EngineOption = Annotated[
    Literal["torch", "jax", "mlx"] | None,
    typer.Option(help="The engine; the one that suits this machine unless given.", show_default=False),
]
ContinueOption = Annotated[
    Literal["torch", "jax", "mlx"] | None,
    typer.Option(help="The engine for all that is not done yet; it goes on from checkpoints of others too."),
]
StoreOption = Annotated[
    str | None, typer.Option(help="Folder or URL of the store.", envvar="CAIRN_STORE", show_default="~/.cairn/store")
]


@app.command(epilog="Example: cairn run arithmetic --set stages.base.training.steps=500")
def run(
    recipe: RecipeArgument = "arithmetic",
    overrides: SetOption = None,
    store: StoreOption = None,
    published: Annotated[Path, typer.Option(help="Where published folders are laid out.")] = Path("published"),
    continue_on: ContinueOption = None,
) -> None:
    """Runs a recipe: what is in the store is reused, what was interrupted goes on."""
    from flows.recipe import load_recipe

    # Checked before Prefect is imported, which takes seconds.
    loaded = load_recipe(recipe, overrides or [], continue_on=continue_on)
    _set_prefect_up(QUIET)
    if any(entry.runtime.worker != "local" for entry in loaded.stages):
        _configured_server()
    from flows.run import run_recipe

    run_recipe(loaded, overrides or [], Store.open(store), published, console, continue_on)


@app.command(epilog="Example: cairn plan arithmetic --set stages.base.training.seed=1")
def plan(
    recipe: RecipeArgument = "arithmetic",
    overrides: SetOption = None,
    store: StoreOption = None,
    continue_on: ContinueOption = None,
) -> None:
    """Says for every stage whether it would be reused or run, and why; runs nothing."""
    from flows.console import plan_table
    from flows.plan import plan as plan_recipe
    from flows.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [], continue_on=continue_on)
    console.print(plan_table(plan_recipe(loaded, Store.open(store), continue_on)))


@app.command(epilog="Example: cairn server")
def server(
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than this machine's need a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 4200,
) -> None:
    """Serves Prefect's API and UI for workers and pipelines, until it is stopped."""
    _set_prefect_up()
    from flows.server import serve

    serve(host, port)


@app.command(epilog="Example: cairn deploy")
def deploy() -> None:
    """Tells the Prefect server of Cairn's pools, automations and deployments; safe to repeat."""
    url = _configured_server()
    from flows.deploy import deploy as deploy_all
    from flows.server import check_answers

    check_answers(url)
    deploy_all(lambda line: console.print(escape(line), highlight=False, soft_wrap=True))


@app.command(epilog="Example: cairn worker cuda")
def worker(
    pool: Annotated[Literal["pipeline", Hardware], typer.Argument(help="The pool whose runs it takes.")],
    name: Annotated[str | None, typer.Option(help="The worker's name; made of the machine's unless given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Runs at a time: 1, or 10 pipelines.")] = None,
    store: StoreOption = None,
) -> None:
    """Takes the stages of a pool, or pipelines, from the Prefect server until it is stopped."""
    url = _configured_server()
    from flows.worker import run_worker

    sys.exit(run_worker(pool, url, Store.open(store), name, limit or (10 if pool == "pipeline" else 1)))


def _set_prefect_up(more: Mapping[str, str] = MappingProxyType({})) -> None:
    """What Prefect is told before it is imported."""
    for name, value in {**PREFECT_SETTINGS, **more}.items():
        os.environ.setdefault(name, value)


def _configured_server() -> str:
    """The Prefect server's address; raises UserError where none is configured."""
    _set_prefect_up()
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        raise UserError(
            "no Prefect server is configured: start one with `cairn server`, and set PREFECT_API_URL to its address, "
            "such as http://127.0.0.1:4200/api"
        )
    return str(url)


@app.command(epilog="Example: cairn recipes")
def recipes() -> None:
    """Lists the recipes that come with Cairn."""
    from flows.recipe import known_recipes, load_recipe

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("recipe", "description", "stages"):
        table.add_column(column)
    for name in known_recipes():
        # Looked at and not run: the data of some are not on every machine.
        loaded = load_recipe(name, resolve=False)
        stages = [stage.name for stage in loaded.stages]
        # A study has too many to be read.
        shown = " → ".join(stages) if len(stages) <= 20 else f"{len(stages)} stages"
        table.add_row(name, escape(loaded.description), shown)
    console.print(table)


@app.command(epilog="Example: cairn show models/arithmetic@base")
def show(
    ref: RefArgument,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The record as it is stored.")] = False,
    samples: Annotated[
        str | None, typer.Option(metavar="TASK", help="Of an evaluation or a report: the samples of a task instead.")
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Those samples alone that were answered wrongly.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Samples that are shown.")] = 20,
) -> None:
    """Shows what an artifact is: its record, files and measurements, or the samples of an evaluation."""
    from flows.console import record_table

    opened = Store.open(store)
    record = opened.resolve(ref)
    if samples is not None:
        from flows.score_tables import show_samples

        show_samples(opened, record, samples, wrong, count, console)
        return
    if as_json:
        sys.stdout.write(record.to_json().decode())
        return
    console.print(record_table(record))
    for name, place in opened.attachments(record.key).items():
        console.print(f"[dim]attached[/] {escape(name)}: {escape(place)}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: cairn lineage models/arithmetic --format html > lineage.html")
def lineage(
    ref: RefArgument,
    store: StoreOption = None,
    format: Annotated[Literal["tree", "json", "html"], typer.Option(help="How it is written.")] = "tree",
) -> None:
    """Traces an artifact back, stage by stage, to the documents that it was made from."""
    import json

    from artifacts import page
    from artifacts.lineage import to_json, to_text, tree

    opened = Store.open(store)
    root = tree(opened, opened.resolve(ref))
    if format == "tree":
        text = to_text(root)
    elif format == "json":
        text = json.dumps(to_json(root), indent=2, ensure_ascii=False)
    else:
        text = page.to_html(root)
    sys.stdout.write(text.rstrip("\n") + "\n")


@app.command(epilog="Example: cairn verify models/arithmetic")
def verify(
    ref: Annotated[str | None, typer.Argument(help="What to verify; the whole store unless given.")] = None,
    store: StoreOption = None,
) -> None:
    """Hashes files again and compares them with their records."""
    opened = Store.open(store)
    verification = opened.verify(opened.resolve(ref) if ref else None)
    for damage in verification.damages:
        line = f"[red]{damage.kind}[/] {escape(damage.path)}: {escape(damage.detail)}"
        errors.print(line, highlight=False, soft_wrap=True)
    console.print(f"{verification.files:,} files of {verification.records:,} records hashed", highlight=False)
    if verification.damages:
        raise UserError(f"{len(verification.damages)} damaged or missing; run the recipe again to make them anew")


@app.command(epilog='Example: cairn generate models/arithmetic --chat --prompt "What is 554 + 456?"')
def generate(
    ref: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file with one prompt to a line.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Asks a chat model: prompts are what a user says, in its own template.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="A file for the texts, a line each, or with their prompts in a .jsonl file.")
    ] = None,
    store: StoreOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens after which a text ends: 64, or 256 with --chat.", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 for the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draws among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Draws among the likeliest of this mass.")] = None,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 makes repetition less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Keys the draws.")] = 0,
    engine: EngineOption = None,
) -> None:
    """Continues prompts with a model, or answers them."""
    from flows.inference import continue_prompts, read_prompts, write_texts

    prompts = [*(prompt or []), *(read_prompts(prompts_file, chat) if prompts_file else [])]
    if not prompts:
        raise UserError("nothing to continue: give --prompt or --prompts-file")
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    texts = continue_prompts(Store.open(store), ref, prompts, settings, engine, chat)
    if output is not None:
        write_texts(output, prompts, texts)
        console.print(f"{len(texts)} texts in {escape(str(output))}", highlight=False)
        return
    for before, text in zip(prompts, texts, strict=True):
        between = "\n" if chat else ""
        console.print(f"[dim]{escape(before)}[/]{between}{escape(text)}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: cairn evaluate published/elite-112m --tasks seed,perplexity,behaviour")
def evaluate(
    ref: ModelArgument,
    store: StoreOption = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks, groups or tags of lm-eval, the group seed, perplexity and behaviour, with commas between; the "
            "model's own documents unless given.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; all unless given.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; as the task says unless given.")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Puts <bos> before every text; as its tokenizer does unless given."),
    ] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="The split of its documents.")] = "test",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that an answer may have: 16, or 256 in a conversation.", show_default=False),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Lets metrics run that are fetched from the hub as programs.")
    ] = False,
    engine: EngineOption = None,
) -> None:
    """Scores a model on benchmarks, or on the documents that it was evaluated on, or else on those that it was made
    from; a score that is in the store is not made again."""
    if tasks is not None:
        from flows.evaluation_command import evaluate_on

        keys = {"tasks": tasks, "limit": limit, "num_fewshot": num_fewshot, "bos": bos, "engine": engine}
        keys |= {"trust_remote_code": trust_remote_code}
        evaluate_on(Store.open(store), ref, keys, console)
        return
    from flows.evaluation_tables import evaluation_tables
    from flows.inference import evaluate_ref

    for record in evaluate_ref(Store.open(store), ref, split, engine, max_new_tokens):
        console.print(evaluation_tables(record))


@app.command(epilog="Example: cairn gc --grace-days 2")
def gc(
    store: StoreOption = None,
    grace_days: Annotated[float, typer.Option(min=0, help="Leaves alone what is younger.")] = DEFAULT_GRACE.days,
    yes: Annotated[bool, typer.Option("--yes", help="Does not ask.")] = False,
) -> None:
    """Removes what no name reaches and no run holds."""
    opened = Store.open(store)
    plan = collect.plan(opened, timedelta(days=grace_days))
    if not plan.garbage:
        console.print("nothing to remove")
        return
    for one in plan.garbage:
        console.print(f"{one.size:>14,} bytes  {one.kind:<10} {escape(one.path)}", highlight=False, soft_wrap=True)
    if not yes and not typer.confirm(f"Remove these {len(plan.garbage)}, {plan.size:,} bytes?"):
        console.print("nothing removed")
        return
    removed = collect.remove(opened, plan)
    console.print(f"{len(removed.garbage)} removed, {removed.size:,} bytes", highlight=False)


class _OnConsole(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(f"[yellow]{escape(record.getMessage())}[/]", highlight=False, soft_wrap=True)


def main() -> None:
    """Runs the command; an error that the user can mend is one line."""
    # Not the root logger, which Prefect's and everybody's messages reach.
    logging.getLogger("cairn").addHandler(_OnConsole(logging.WARNING))
    try:
        app(prog_name="cairn")
    except UserError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except StageFailed as error:
        # It brings the traceback of the process that failed; that of this one says nothing more.
        errors.print(escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(1)
    except StageInterrupted as error:
        errors.print(f"[yellow]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""Every command, on one store that a real run made."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts.store import Store
from flows import cli, inference
from flows.recipe import known_recipes
from tests.flows.conftest import DATA, ROOT, Made, assert_one_line, spoil

MODEL = "models/arithmetic-tiny"
COMMANDS = [command.callback.__name__ for command in cli.app.registered_commands if command.callback is not None]
HEAVY = ("torch", "jax", "mlx", "prefect", "transformers", "pyarrow", "matplotlib", "tensorboard")


class Ran(NamedTuple):
    code: int
    out: str
    error: str


Command = Callable[..., Ran]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `cairn` in this process, which is much quicker than in its own."""
    monkeypatch.setattr(logging.getLogger("cairn"), "handlers", [])
    monkeypatch.setattr(cli.console, "_width", 250)

    def run(*arguments: str, answer: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["cairn", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        assert isinstance(code, int)
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def test_every_command_is_tested() -> None:
    # Those of a fleet are tested in tests/deployment.
    fleet = ["server", "deploy", "worker"]
    assert ["run", "plan", *fleet, "recipes", "show", "lineage", "verify", "generate", "evaluate", "gc"] == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, command: Command) -> None:
    ran = command(name, "--help")
    assert ran.code == 0
    assert f"Example: cairn {name}" in ran.out
    assert f"Usage: cairn {name}" in ran.out


def test_help_lists_every_command(command: Command) -> None:
    ran = command("--help")
    assert ran.code == 0
    assert all(name in ran.out for name in COMMANDS)


def test_an_unknown_command(command: Command) -> None:
    ran = command("evalute")
    assert ran.code == 2
    assert "No such command 'evalute'" in ran.error
    assert "'evaluate'" in ran.error


@pytest.mark.parametrize(
    "arguments", [("run", "arithmetic-tiny", "--set", "stages.base.worker=cpu"), ("deploy",), ("worker", "cpu")]
)
def test_workers_need_a_server(arguments: tuple[str, ...], command: Command) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    # The process may have a server already: that of other tests.
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        ran = command(*arguments)
    assert ran.code == 1
    assert "no Prefect server is configured: start one with `cairn server`" in ran.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "arithmetik-tiny"), "there is no recipe 'arithmetik-tiny'; did you mean 'arithmetic-tiny'?"),
        (("plan", "missing.yaml"), "there is no recipe file missing.yaml"),
        (("plan", "arithmetic-tiny", "--set", "stages.base.trainin.steps=1"), "did you mean 'training'?"),
        (("show", "models/arithmetic-tyni"), "did you mean 'models/arithmetic-tiny'?"),
        (("lineage", "nothing"), "is called 'nothing'"),
        (("verify", "ffffff"), "is called 'ffffff'"),
        (("generate", "nothing", "--prompt", "1+1="), "is called 'nothing'"),
        (("evaluate", "nothing"), "is called 'nothing'"),
        (("show", MODEL, "--store", "nosuch://place"), "nosuch"),
    ],
)
def test_what_does_not_exist_is_said_in_a_line(
    arguments: tuple[str, ...], message: str, command: Command, own_store: Path
) -> None:
    ran = command(*arguments)
    assert ran.code == 1
    assert ran.out == ""
    assert_one_line(ran.error, message)


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "show", "nothing"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CAIRN_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: nothing in {tmp_path / 'store'} is called 'nothing'\n"
    assert not (tmp_path / "store").exists()


def test_recipes(command: Command) -> None:
    ran = command("recipes")
    assert ran.code == 0
    assert all(name in ran.out for name in known_recipes())
    assert "expressions → questions → tokenizer → tokens → answers → base" in ran.out


def test_the_plan(command: Command, own_store: Path) -> None:
    ran = command("plan", "arithmetic-tiny", "--set", "stages.refined.training.seed=3")
    rows = {line.split()[0]: line for line in ran.out.splitlines()}
    assert ran.code == 0
    assert all("reused" in rows[name] for name in (*DATA, "base", "stacked"))
    assert "to run" in rows["refined"]
    assert "training.seed: 0 → 3" in rows["refined"]
    assert "its input 'refined' will be made first" in rows["tuned"]


def test_the_plan_with_another_engine(command: Command, own_store: Path) -> None:
    pytest.importorskip("mlx")
    change = ("plan", "arithmetic-tiny", "--set", "stages.refined.training.seed=3")
    rows = {line.split()[0]: line for line in command(*change, "--continue-on", "mlx").out.splitlines()}
    # What any engine has done stays done.
    assert all("reused" in rows[name] for name in (*DATA, "base", "stacked"))
    assert "to run" in rows["refined"]
    assert "engine: 'torch' → 'mlx'; training.seed: 0 → 3" in rows["refined"]
    rows = {
        line.split()[0]: line for line in command("plan", "arithmetic-tiny", "--set", "engine=mlx").out.splitlines()
    }
    assert "to run" in rows["base"]


def test_show(command: Command, made: Made, own_store: Path) -> None:
    ran = command("show", f"{MODEL}@base")
    rows = dict(line.split(maxsplit=1) for line in ran.out.splitlines() if len(line.split()) > 1)
    assert ran.code == 0
    assert rows["stage"].strip() == "pretrain"
    assert rows["config.training.steps"].strip() == "40"
    assert rows["metrics.validation.1.step"].strip() == "40"
    assert "model.safetensors" in ran.out
    assert f"attached loss.png: {own_store}/attachments/" in ran.out
    assert "attached training.csv: " in ran.out


def test_show_as_json_is_the_record(command: Command, own_store: Path) -> None:
    ran = command("show", MODEL, "--json")
    record = json.loads(ran.out)
    assert ran.out.encode() == (own_store / "records" / f"{record['key']}.json").read_bytes()
    # A key and a digest name the same thing, and so do their beginnings.
    for ref in (record["key"], record["key"][:10], record["output"], record["output"][:10], f"{MODEL}@published"):
        assert command("show", ref, "--json").out == ran.out


def test_lineage_as_a_tree(command: Command, made: Made, own_store: Path) -> None:
    ran = command("lineage", MODEL)
    lines = ran.out.splitlines()
    assert ran.code == 0
    assert lines[0].startswith(f"{MODEL}  publish  ")
    assert any(f"tokenizer: {MODEL}@tokenizer" in line for line in lines)
    assert sum("see above" in line for line in lines) == 7
    # What the run itself showed at its end.
    assert [line.split("(")[0] for line in made.output.splitlines()[-len(lines) :]] == [
        line.split("(")[0] for line in lines
    ]


def test_lineage_as_json(command: Command, own_store: Path) -> None:
    ran = command("lineage", MODEL, "--format", "json")
    assert ran.code == 0
    assert json.loads(ran.out)
    assert all(f'"{stage}"' in ran.out for stage in ("publish", "sft", "refine", "stack", "pretrain", "documents"))


def test_lineage_as_a_page(command: Command, own_store: Path) -> None:
    ran = command("lineage", MODEL, "--format", "html")
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_data = seen.append  # type: ignore[assignment]
    parser.feed(ran.out)
    assert ran.code == 0
    assert ran.out.startswith("<!doctype html>")
    assert f"{MODEL}@base" in " ".join(seen)
    assert "http://" not in ran.out.replace("http://www.w3.org", "")


def test_a_format_that_is_none(command: Command, own_store: Path) -> None:
    ran = command("lineage", MODEL, "--format", "xml")
    assert ran.code == 2
    assert "'xml' is not one of" in ran.error


def test_a_sound_store_is_verified(command: Command, own_store: Path) -> None:
    ran = command("verify")
    files = sum(1 for path in (own_store / "objects").rglob("*") if path.is_file())
    assert ran == (0, f"{files} files of 14 records hashed\n", "")


def test_one_bit_is_found(command: Command, own_store: Path) -> None:
    digest = Store.open().resolve(f"{MODEL}@base").output
    spoil(own_store / "objects" / digest / "model.safetensors")
    assert command("verify", f"{MODEL}@stacked").code == 0
    ran = command("verify")
    assert ran.code == 1
    assert f"damaged objects/{digest}/model.safetensors: its bytes differ; made by stage 'base'" in ran.error
    assert_one_line(ran.error, "1 damaged or missing; run the recipe again to make them anew")
    plan = {line.split()[0]: line for line in command("plan", "arithmetic-tiny").out.splitlines()}
    assert "its record or files are damaged or gone" in plan["base"]


def test_prompts_are_continued(command: Command, own_store: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1=\n2+7=\n")
    shown = command("generate", f"{MODEL}@refined", "--prompt", "1+1=", "--prompt", "2+7=", "--max-new-tokens", "3")
    assert shown.code == 0
    texts = [line.partition("=") for line in shown.out.splitlines()]
    assert [before for before, _, _ in texts] == ["1+1", "2+7"]
    # A published model and one that is still to be published are the same model.
    output = tmp_path / "texts.txt"
    written = command(
        *("generate", f"{MODEL}@expressions-before", "--prompts-file", str(prompts)),
        *("--output", str(output), "--max-new-tokens", "3"),
    )
    assert written == (0, f"2 texts in {output}\n", "")
    assert output.read_text().splitlines() == [after for _, _, after in texts]
    drawn = [
        command("generate", MODEL, "--prompt", "1+1=", "--temperature", "5", "--seed", seed).out for seed in "0011"
    ]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    by_engine = [command("generate", MODEL, "--prompt", "1+1=", "--engine", engine) for engine in ("jax", "mlx")]
    assert by_engine == [command("generate", MODEL, "--prompt", "1+1=")] * 2


def test_questions_are_answered(command: Command, made: Made, own_store: Path, tmp_path: Path) -> None:
    questions = ["What is 1 + 1?", "Anna has 2 apples and gets 7 more. How many apples does Anna have now?"]
    asked = [part for question in questions for part in ("--prompt", question)]
    shown = command("generate", MODEL, "--chat", *asked, "--max-new-tokens", "24")
    assert shown.code == 0
    # What the published folder answers in transformers.
    tokenizer: Any = AutoTokenizer.from_pretrained(made.folder / "published" / "arithmetic-tiny")
    model: Any = AutoModelForCausalLM.from_pretrained(made.folder / "published" / "arithmetic-tiny")
    answers = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    assert shown.out == "".join(f"{question}\n{answer}\n" for question, answer in zip(questions, answers, strict=True))
    output = tmp_path / "answers.jsonl"
    written = command("generate", MODEL, "--chat", *asked, "--output", str(output), "--max-new-tokens", "24")
    # Loading with transformers has written to the terminal, too.
    assert written[:2] == (0, f"2 texts in {output}\n")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [{"prompt": one, "text": answer} for one, answer in zip(questions, answers, strict=True)]


def test_a_base_model_has_no_template(command: Command, own_store: Path) -> None:
    ran = command("generate", f"{MODEL}@refined", "--chat", "--prompt", "What is 1 + 1?")
    assert ran.code == 1
    assert_one_line(ran.error, f"'{MODEL}@refined' is no chat model: its tokenizer has no chat template", "--chat")


def test_texts_are_written_so_that_each_is_told_from_the_next(tmp_path: Path) -> None:
    prompts, texts = ["“a”\n", "b"], ["one\ntwo\r\n\u2028", ""]
    inference.write_texts(tmp_path / "texts.txt", prompts, texts)
    assert (tmp_path / "texts.txt").read_bytes().decode() == "one\\ntwo\\r\\n\u2028\n\n"
    inference.write_texts(tmp_path / "texts.jsonl", prompts, texts)
    rows = [
        json.loads(line) for line in (tmp_path / "texts.jsonl").read_bytes().decode().removesuffix("\n").split("\n")
    ]
    assert rows == [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to continue: give --prompt or --prompts-file"),
        (("--prompt", "1+\udcff="), "is no Unicode: '\\udcff' is half of a surrogate pair"),
        (("--prompt", "1" * 99), "has 100 tokens; the model takes 96"),
        (("--chat", "--prompt", "1" * 99), "tokens; the model takes 96"),
        (("--chat", "--prompt", "1", "--prompt", " "), "prompt 2 is empty: a chat model has nothing to answer"),
        (("--prompts-file", "missing.txt"), "missing.txt cannot be read"),
        (("--prompt", "1+1=", "--output", "missing/texts.txt"), "missing/texts.txt cannot be written"),
    ],
)
def test_what_cannot_be_continued(
    arguments: tuple[str, ...],
    message: str,
    command: Command,
    own_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command("generate", MODEL, *arguments)
    assert ran.code == 1
    assert_one_line(ran.error, message)


def test_documents_are_no_model(command: Command, own_store: Path) -> None:
    ran = command("generate", f"{MODEL}@expressions", "--prompt", "1+1=")
    assert ran.code == 1
    assert_one_line(ran.error, "'expressions' (documents) is no model and was made from none")


def test_a_score_is_made_by_the_engine_that_is_named(command: Command, own_store: Path) -> None:
    first, again = command("evaluate", MODEL), command("evaluate", MODEL, "--engine", "mlx")
    assert again == first
    assert {record.engine for record in Store.open().records() if record.stage == "evaluate"} == {"torch", "mlx"}


def test_a_score_is_made_once(command: Command, own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = command("evaluate", MODEL)
    assert first.code == 0, first
    for stage in ("expressions-after", "questions-after"):
        metrics: Any = Store.open().resolve(f"{MODEL}@{stage}").metrics
        assert f"{metrics['exact_match']:.2%} ± {metrics['standard_error']:.2%}" in first.out
        assert all(sample["prompt"] in first.out for sample in metrics["samples"])
    records = sorted(path.name for path in (own_store / "records").glob("*.json"))
    assert len(records) == 16

    def no_process() -> None:
        raise AssertionError("it is made again")

    monkeypatch.setattr(inference, "engine_process", no_process)
    # By whichever name: it is the same model.
    assert command("evaluate", MODEL) == command("evaluate", f"{MODEL}@tuned") == first
    assert sorted(path.name for path in (own_store / "records").glob("*.json")) == records


def test_nothing_young_is_removed(command: Command, own_store: Path) -> None:
    assert command("gc") == (0, "nothing to remove\n", "")


def test_only_what_no_name_reaches_is_removed(command: Command, own_store: Path) -> None:
    store = Store.open()
    gone = store.resolve(MODEL)
    for name in (MODEL, f"{MODEL}@published"):
        store.remove_name(name)
    kept = {name: store.resolve(name) for name in store.names()}
    refused = command("gc", "--grace-days", "0", answer="n\n")
    assert refused.code == 0
    assert f"objects/{gone.output}" in refused.out
    assert f"records/{gone.key}.json" in refused.out
    assert "nothing removed" in refused.out
    assert store.find(gone.key) == gone
    assert command("gc", "--grace-days", "0").code == 1, "no answer is no yes"
    assert store.find(gone.key) == gone
    removed = command("gc", "--grace-days", "0", "--yes")
    assert removed.code == 0
    assert " removed, " in removed.out
    assert store.find(gone.key) is None
    assert not (own_store / "objects" / gone.output).exists()
    assert {name: store.resolve(name) for name in store.names()} == kept
    assert command("verify").code == 0
    assert command("gc", "--grace-days", "0") == (0, "nothing to remove\n", "")


def test_asked_and_answered_yes(command: Command, own_store: Path) -> None:
    # Checkpoints of stages that are done are all that a fresh store can spare.
    ran = command("gc", "--grace-days", "0", answer="y\n")
    assert ran.code == 0
    assert "checkpoints/" in ran.out
    assert " removed, " in ran.out
    assert not list((own_store / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipes"], ["plan", "arithmetic-tiny"], ["show", MODEL], ["lineage", MODEL]]
)
def test_quick_commands_import_nothing_heavy(arguments: list[str], own_store: Path) -> None:
    code = f"""
import sys
from flows.cli import main
sys.argv = ["cairn", *{arguments!r}]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "\n"

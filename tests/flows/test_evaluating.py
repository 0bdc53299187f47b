"""What a model is asked, what is asked again, and what becomes of its history."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from artifacts.errors import LeaseLost
from artifacts.record import Record
from artifacts.store import Store
from common.errors import UserError
from common.files import sha256_bytes
from flows.evaluating import Asking, Evaluated, _groups, evaluate, history, keep, questions, renewed, report_name, works
from flows.inference import model_record
from flows.score_tables import score_table
from tasks.produce import produce
from tasks.report import REPORT_DATA, read_report
from tasks.work import Work
from tests.flows.test_exact_match import shown
from tests.tasks.harness.against_hf import random_model
from tests.tasks.made_group import SIZES, write_group_data

REF = "models/tiny"
COPA = Asking(tasks=("copa",), limit=4)
Ask = Callable[..., Evaluated]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a published folder."""
    return random_model(tmp_path_factory.mktemp("random"), "llama").published


@pytest.fixture
def store(published: Path) -> Store:
    """A store in which the model has a name."""
    store = Store.open()
    store.set_name(REF, model_record(store, str(published)).key)
    return store


@pytest.fixture
def done() -> list[Work]:
    """What was done, and not reused."""
    return []


@pytest.fixture
def ask(store: Store, done: list[Work]) -> Ask:
    """Evaluates the model and keeps what was found."""

    def do(work: Work) -> Record:
        outcome = produce(store, work, lambda event: None)
        if not outcome.reused:
            done.append(work)
        return outcome.record

    def asked(asking: Asking = COPA, level: float = 0.01, kept: bool = True) -> Evaluated:
        return evaluate(store, REF, asking, do, level, keeps=lambda found: kept)

    return asked


def accuracy(found: Evaluated) -> float:
    """What the one evaluation says."""
    scores: Any = found.evaluations[0].metrics["scores"]
    (value,) = [score["value"] for score in scores if score["metric"] == "acc"]
    return float(value)


def change(store: Store, published: Path, folder: Path) -> None:
    """Points the name at a model that finds likely what the other finds unlikely."""
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": -weights["lm_head.weight"]}
    save_file({**weights, **head}, folder / "model.safetensors", {"format": "pt"})
    store.set_name(REF, model_record(store, str(folder)).key)


def test_the_first_time_has_nothing_to_compare_with(store: Store, ask: Ask, done: list[Work]) -> None:
    found = ask()
    assert [work.stage for work in done] == ["benchmark", "report"]
    assert found.is_news
    assert found.falls == []
    assert store.resolve(report_name(REF)) == found.report
    assert set(found.report.inputs) == {"evaluations.0"}
    assert found.report.metrics["snapshots"] == 1


def test_what_has_not_changed_is_not_done_again(store: Store, ask: Ask, done: list[Work]) -> None:
    first = ask()
    before = len(done)
    second = ask()
    assert len(done) == before
    assert not second.is_news
    assert (second.report, second.evaluations) == (first.report, first.evaluations)


def test_the_same_weights_under_another_key_are_no_news(
    store: Store, ask: Ask, published: Path, tmp_path: Path, done: list[Work]
) -> None:
    ask()
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in published.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    record = model_record(store, str(copied))
    assert record.key != store.names()[REF]
    store.set_name(REF, record.key)
    before = len(done)
    assert not ask().is_news
    assert len(done) == before


def test_another_model_is_compared_with_the_one_before(store: Store, ask: Ask, published: Path, tmp_path: Path) -> None:
    first = ask()
    change(store, published, tmp_path / "contrary")
    second = ask(level=0.9999)
    assert second.is_news
    # The history is data: an input would keep every model that was ever evaluated.
    assert first.report.key not in {reference.key for reference in second.report.inputs.values()}
    assert second.report.inputs["others.0"].key == first.evaluations[0].key
    assert second.report.metrics["snapshots"] == 2
    report = read_report(store.fetch(second.report) / REPORT_DATA)
    scores = {one.metric: one for one in report.differences}
    assert (scores["acc"].second, scores["acc"].first) == (accuracy(first), accuracy(second))
    assert second.falls == [one for one in report.differences if one.p < 0.9999 and one.difference < 0]


def test_what_was_not_kept_is_found_again(store: Store, ask: Ask, published: Path, tmp_path: Path) -> None:
    first = ask()
    change(store, published, tmp_path / "contrary")
    once = ask(level=0.9999, kept=False)
    assert store.resolve(report_name(REF)) == first.report
    again = ask(level=0.9999)
    assert again.falls == once.falls
    assert again.evaluations == once.evaluations
    assert store.resolve(report_name(REF)) == again.report
    assert ask(level=0.9999).falls == []


def test_a_model_that_gave_its_name_away_meanwhile_is_no_news(
    store: Store, ask: Ask, published: Path, tmp_path: Path
) -> None:
    def do(work: Work) -> Record:
        record = produce(store, work, lambda event: None).record
        if work.stage == "benchmark" and not (tmp_path / "contrary").exists():
            change(store, published, tmp_path / "contrary")
        return record

    found = evaluate(store, REF, COPA, do)
    assert found.evaluations[0].inputs["model"].digest == model_record(store, REF).output
    assert found.report.metrics["snapshots"] == 1
    # The same of what was found and is to be told later.
    store.set_name(REF, model_record(store, str(published)).key)
    with history(store, REF):
        assert renewed(store, REF, found, do) is None


def test_who_was_killed_while_keeping_is_made_up_for(store: Store, ask: Ask) -> None:
    ask()
    (base,) = (name for name in store.names() if name.startswith(f"{report_name(REF)}@"))
    key = store.names()[base]
    store.remove_name(base)
    assert not ask().is_news
    assert store.names()[base] == key


@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_two_at_once_lose_nothing(
    store: Store, published: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifacts.object_lease.POLL_SECONDS", 0.05)
    if kind != "folder":
        store = Store.open(f"memory://{tmp_path.name}")
        store.set_name(REF, model_record(store, str(published)).key)
    both = Barrier(2)

    def do(work: Work) -> Record:
        # Both would have read the same history by now.
        if work.stage == "report":
            with suppress(BrokenBarrierError):
                both.wait(timeout=1.0)
        return produce(store, work, lambda event: None).record

    askings = [Asking(tasks=(task,), limit=4) for task in ("copa", "wsc273")]
    for asking in askings:  # what is asked twice at once is done once, as of any stage
        for work in works(store, model_record(store, REF), asking):
            produce(store, work, lambda event: None)
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda asking: evaluate(store, REF, asking, do), askings))
    report = read_report(store.fetch(store.resolve(report_name(REF))) / REPORT_DATA)
    assert {score.task for one in report.evaluations for score in one.scores} == {"copa", "wsc273"}
    assert sorted(score.task for one in report.history for score in one.scores) == ["copa", "wsc273"]
    assert store.resolve(report_name(REF)) in [one.report for one in found]
    assert [evaluate(store, REF, asking, do).is_news for asking in askings] == [False, False]


def test_a_fall_that_two_have_found_is_told_once(
    store: Store, ask: Ask, published: Path, tmp_path: Path, done: list[Work]
) -> None:
    def do(work: Work) -> Record:
        return produce(store, work, lambda event: None).record

    boolq = Asking(tasks=("boolq",), limit=30)
    ask(boolq)
    change(store, published, tmp_path / "contrary")
    first, second = (ask(boolq, level=0.9999, kept=False) for _ in range(2))
    assert first.falls == second.falls != []
    # Something else becomes known before the first one tells of it.
    ask(Asking(tasks=("wsc273",), limit=4))
    with history(store, REF) as lease:
        latest = renewed(store, REF, first, do, 0.9999)
        assert latest is not None
        assert latest.falls == first.falls
        keep(store, REF, latest, lease)
    report = read_report(store.fetch(store.resolve(report_name(REF))) / REPORT_DATA)
    assert [one.scores[0].task for one in report.history] == ["boolq", "wsc273", "boolq"]
    with history(store, REF) as lease:
        latest = renewed(store, REF, second, do, 0.9999)
        assert latest is not None
        assert (latest.is_news, latest.falls) == (False, [])
        assert renewed(store, REF, latest, do, 0.9999) is latest
        (Path(store.root) / "leases" / f"{sha256_bytes(report_name(REF).encode())}.lock").unlink()
        with pytest.raises(LeaseLost, match="was removed by somebody"):
            keep(store, REF, first, lease)
    assert store.resolve(report_name(REF)) == latest.report


def test_another_limit_is_compared_with_nothing(store: Store, ask: Ask, published: Path, tmp_path: Path) -> None:
    first = ask()
    change(store, published, tmp_path / "contrary")
    more = ask(COPA.model_copy(update={"limit": 5}), level=0.9999)
    assert more.is_news
    assert more.report.metrics["compared"] == 0
    assert not any(name.startswith("others") for name in more.report.inputs)
    # The first limit is compared with its own last time, however long ago that was.
    back = ask(level=0.9999)
    assert back.report.inputs["others.0"].key == first.evaluations[0].key


def test_a_task_that_is_added_keeps_the_others(store: Store, ask: Ask, done: list[Work]) -> None:
    first = ask()
    both = ask(Asking(tasks=("winogrande",), limit=4))
    assert [work.name for work in done] == ["copa", report_name(REF), "winogrande", report_name(REF)]
    kept = {reference.key for name, reference in both.report.inputs.items() if name.startswith("evaluations")}
    assert kept == {both.evaluations[0].key, first.evaluations[0].key}
    report = read_report(store.fetch(both.report) / REPORT_DATA)
    assert {score.task for one in report.evaluations for score in one.scores} == {"copa", "winogrande"}
    assert report.differences == ()
    # Asked for the first one alone, nothing is new.
    assert not ask().is_news


def test_scores_of_another_model_are_not_kept_beside_new_ones(
    store: Store, ask: Ask, published: Path, tmp_path: Path
) -> None:
    ask()
    change(store, published, tmp_path / "contrary")
    found = ask(Asking(tasks=("winogrande",), limit=4))
    assert [found.report.inputs[name].key for name in found.report.inputs if name.startswith("evaluations")] == [
        found.evaluations[0].key
    ]


def test_a_group_is_told_beside_its_tasks(
    store: Store, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: list[Work]
) -> None:
    hub = write_group_data(tmp_path / "hub")
    (hub / "aps").symlink_to(Path(os.environ["CAIRN_HUB"]) / "aps")
    monkeypatch.setenv("CAIRN_HUB", str(hub))
    tasks = ask(Asking(tasks=(*SIZES,)))
    assert tasks.groups == []
    group = Asking(tasks=("wmdp",))
    found = ask(group)
    # Its tasks are not asked again, and their scores are no news; its own is.
    assert [work.stage for work in done] == ["benchmark"] * 3 + ["report"] * 2
    assert found.is_news
    assert found.evaluations == tasks.evaluations
    scores: Any = [one.metrics["scores"] for one in found.evaluations]
    mean = sum(score["value"] * score["n"] for (score,) in scores) / sum(SIZES.values())
    report = read_report(store.fetch(found.report) / REPORT_DATA)
    ((provenance, (told, members)),) = report.grouped
    assert told.value == pytest.approx(mean)
    assert (told.task, told.n, members) == ("wmdp", 19, tuple(SIZES))
    assert (provenance.num_fewshot, provenance.lm_eval, list(provenance.data)) == (0, "0.4.13", ["cais/wmdp"])
    assert [[score.task for score in one.scores] for one in report.history] == [[*SIZES], ["wmdp"]]
    assert report.history[1].scores == (told,)
    lines = shown(score_table(found.evaluations, found.groups), 120)
    (line,) = (line for line in lines if "tasks" in line)
    assert line.split()[:5] == ["wmdp:", "3", "tasks", "acc", f"{100 * mean:.1f}%"]
    assert not ask(group).is_news
    # The rest of the tasks does not take it away, unless one of them is asked otherwise.
    kept = ask(COPA)
    assert [one.name for one in _groups(kept.report)] == ["wmdp"]
    assert not ask(Asking(tasks=("wmdp_bio",))).is_news
    assert _groups(ask(Asking(tasks=("wmdp_bio",), limit=2)).report) == []
    assert [one.name for one in _groups(ask(group).report)] == ["wmdp"]


def test_each_task_is_a_work_of_its_own(store: Store, published: Path) -> None:
    model = model_record(store, REF)
    asking = Asking(tasks=("seed", "copa", "perplexity", "behaviour"), limit=7, engine="torch", worker="cuda")
    made = works(store, model, asking, "a run")
    assert len(made) == 14
    assert [work.name for work in made[:2]] == ["winogrande", "copa"]
    assert [(work.name, work.stage) for work in made[-2:]] == [
        ("perplexity", "perplexity"),
        ("behaviour", "behaviour"),
    ]
    for work in made:
        assert work.inputs["model"].digest == model.output
        assert (work.runtime.worker, work.flow_run_id) == ("cuda", "a run")
        assert work.config["engine"] == "torch"
    assert {work.config["limit"] for work in made[:12]} == {7}
    assert len({work.key for work in made}) == 14


def test_what_is_wrong_with_the_questions_is_said(store: Store) -> None:
    with pytest.raises(UserError, match=r"cop4.*copa"):
        questions(Asking(tasks=("cop4",)))


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("models/tiny", "evaluations/models/tiny"),
        ("models/tiny@sft", "evaluations/models/tiny@sft"),
        ("published/elite-112m", "evaluations/published/elite-112m"),
        ("openai-community/gpt2", "evaluations/openai-community/gpt2"),
        ("/data/runs/published/elite 112m", "evaluations/published/elite-112m"),
        ("./published/tiny/", "evaluations/published/tiny"),
        ("../published/tiny", "evaluations/published/tiny"),
        ("~/models/../published/tiny", "evaluations/published/tiny"),
    ],
)
def test_a_report_is_named_by_what_was_evaluated(store: Store, ref: str, name: str) -> None:
    assert report_name(ref) == name
    store.set_name(name, store.names()[REF])
    assert store.resolve(name).key == store.names()[REF]

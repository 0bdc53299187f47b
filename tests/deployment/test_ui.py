"""The UI in a headless browser: a run launched by the form, watched, its artifacts opened; nothing asked elsewhere.

`CAIRN_PICTURES=deployment/pictures pytest tests/deployment/test_ui.py` takes those of `deployment/README.md` anew.
"""

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from flows.recipe import known_recipes
from tasks.registry import STAGES
from tests.deployment.browser import CHROMIUM, Browser, browser
from tests.deployment.conftest import RECIPE, Fleet
from tests.deployment.launched import Launched

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
PICTURES = os.environ.get("CAIRN_PICTURES")
ENGINES = [name for name, stage in STAGES.items() if stage.has_engine]
WORKERS_GROUP, ENGINES_GROUP = "worker for each kind of stage", "engine for each kind of stage"
HERE = ("documents", "tokenizer", "tokens", "evaluate", "publish")
"""Kinds of stages that run with the pipeline: starting a run for each takes long on a machine that does it all."""


@pytest.fixture
def ui(fleet: Fleet) -> Iterator[Browser]:
    fleet.worker("pipeline", name="pipelines")
    fleet.worker("cpu")
    with browser(fleet.server.url.removesuffix("/api")) as one:
        yield one


def test_a_run_from_the_form_to_its_artifacts(ui: Browser) -> None:
    ui.open("deployments")
    ui.link("cairn")
    ui.button("Run")
    ui.button("Custom run")
    fields = ui.fields()
    groups = [WORKERS_GROUP, *STAGES, ENGINES_GROUP, *(f"{name} again" for name in ENGINES)]
    titles = ["recipe", "name", "budget in hours", "worker", "engine", *groups, "overrides"]
    assert [title.replace(" (Optional)", "") for title in fields] == titles
    assert all(said for title, said in fields.items() if not title.endswith("again"))
    assert ui.page.locator(".p-code-input").count() == 0
    assert ui.options(ui.field("recipe")) == list(known_recipes())
    ui.page.keyboard.press("Escape")
    ui.choose(ui.field("recipe"), RECIPE)
    ui.field("name").locator("textarea").fill("first look")
    for kind in HERE:
        ui.choose(ui.field(kind, WORKERS_GROUP), "local")
    ui.choose(ui.field("refine", ENGINES_GROUP), "torch")
    ui.picture(PICTURES, "form", 1200)
    ui.button("Submit")
    ui.passing_button("View run")

    ui.state("Completed", 400)
    expect(ui.page.get_by_text("first look", exact=True).first).to_be_visible()
    ui.tab("Task Runs")
    names = ["expressions", "tokenizer", "tokens", "base on cpu", "stacked on cpu", "refined on cpu", "tuned on cpu"]
    for name in (*names, "questions-after", "published"):
        expect(ui.page.get_by_role("link", name=name, exact=True).first).to_be_visible()
    run = ui.page.url.partition("?")[0]
    ui.page.goto(run)
    ui.picture(PICTURES, "run", 1000)
    _see_progress(ui)
    _see_artifacts(ui, run)
    _visit_all_pages(ui)


def _see_progress(ui: Browser) -> None:
    """That of a stage on a worker is on the page of its own run."""
    ui.tab("Subflow Runs")
    ui.link("base on cpu")
    ui.state("Completed", 60)
    expect(ui.page.get_by_text("torch", exact=True).first).to_be_visible()
    ui.artifact(ui.page.url, "base-progress")
    expect(ui.page.get_by_text("step 40/40 · loss")).to_be_visible()
    expect(ui.page.get_by_text("Progress: 100%")).to_be_visible()


def _see_artifacts(ui: Browser, run: str) -> None:
    ui.page.goto(run)
    ui.tab("Artifacts")
    ui.picture(PICTURES, "artifacts", 900, start=".p-tab-navigation")
    ui.artifact(run, f"{RECIPE}-base")
    expect(ui.page.get_by_text("best_validation.loss", exact=True)).to_be_visible()
    for name, picture in ((f"{RECIPE}-base-loss", "Loss curve"), (f"{RECIPE}-tokens-card", "How long the documents")):
        ui.artifact(run, name)
        image = ui.page.locator(f"img[alt^='{picture}']")
        expect(image).to_be_visible()
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("image => image.naturalWidth") > 300
    ui.artifact(run, f"{RECIPE}-published-lineage")
    expect(ui.page.get_by_text(f"models/{RECIPE}@tokenizer").first).to_be_visible()
    ui.picture(PICTURES, "lineage", 700)


def _visit_all_pages(ui: Browser) -> None:
    """Nor does any page ask anything of others; the UI whose pages do is not to be had."""
    pages = "dashboard runs flows deployments work-pools blocks/catalog variables automations events artifacts settings"
    for page in (*pages.split(), "concurrency-limits"):
        ui.open(page)
        ui.page.wait_for_load_state("networkidle")
    expect(ui.page.get_by_text("Dashboard", exact=True).first).to_be_visible()
    assert ui.page.get_by_text("V2 UI").count() == 0
    ui.open("v2/dashboard")
    assert not ui.page.url.endswith("v2/dashboard")
    assert len(ui.asked) > 100
    assert ui.elsewhere() == set()


def test_cancelled_in_the_ui_and_launched_again(ui: Browser, fleet: Fleet) -> None:
    run = Launched(fleet, workers={"pretrain": "cpu"})
    fleet.training()
    ui.open(f"runs/flow-run/{run.id}")
    ui.button("Cancel")
    ui.button("Confirm")
    ui.state("Cancelled", 120)
    assert run.state().name == "Cancelled"
    assert fleet.states() == ["Cancelled"]
    again = Launched(fleet, workers={"pretrain": "cpu"})
    assert again.ended().name == "Completed", again.state()
    assert fleet.states() == ["Cancelled", "Completed"]
    assert "going on from the checkpoint of step" in fleet.stage_log()

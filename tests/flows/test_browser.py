"""The pages of Prefect and MLflow in a real browser.

They show two runs of a small project. With `--screenshots FOLDER` these are the quickstart's, and
each test saves a picture of the page that it has checked.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import psutil
import pytest
from PIL import Image

from plumbline.params.schema import Experiment, steps_of

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

    from tests.conftest import SmallProject
    from tests.flows.conftest import Up

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; `make browser` installs it"),
    # With pictures, the quickstart is trained first.
    pytest.mark.timeout(1800),
]

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT, TALL = 1400, 900, 1300
SIDEBAR, MLFLOW_SIDEBAR, MARGIN = 256, 197, 16
PATIENCE = 60_000
"""Milliseconds; a page is slow where other tests compute beside it."""
DEPLOYMENT = """\
pull: []
deployments:
  - name: tiny
    entrypoint: flows.deployments.align.align
    parameters: {experiment: tiny}
    work_pool: {name: local}
"""
STEPS = steps_of(Experiment())
AFTER_KL_COEF = ("rl", "evaluate", "register")
"""The steps that run again when rl.kl_coef changes."""
CURVES = ("kl", "reward_model", "entropy")
GRAPH_SETTLES = 2000
"""Milliseconds that the graph of a run takes to move into place."""
# MLflow opens as a workbench for agents otherwise, with an assistant at its side.
MLFLOW_FOR_TRAINING = """\
localStorage.setItem("mlflow.workflowType_v1", '"machine_learning"');
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
"""
HIDDEN = "[data-assistant-ui], [data-sonner-toaster] { display: none !important }"


class Shown(NamedTuple):
    """A project that is up, the experiment to look at, and where pictures go."""

    up: Up
    experiment: str
    pictures: Path | None

    def runs(self) -> list[str]:
        """The flow runs of the deployment."""
        deployment = self.up.deployment(f"align/{self.experiment}")["id"]
        found = self.up.ask("flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}})
        return [run["id"] for run in found]

    def tracked(self, filter_string: str) -> list[dict[str, Any]]:
        """MLflow's runs, the newest first."""

        def ask(path: str, body: Any) -> Any:
            url = f"{self.up.mlflow}/api/2.0/mlflow/{path}"
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)

        experiments = ask("experiments/search", {"max_results": 100})["experiments"]
        ids = [experiment["experiment_id"] for experiment in experiments]
        body = {"experiment_ids": ids, "filter": filter_string}
        return [run["info"] for run in ask("runs/search", body)["runs"]]

    def save(self, name: str, page: Page, *until: Locator, left: int = 0) -> None:
        """Save what the page shows, down to the last of some elements."""
        if self.pictures is None:
            return
        # Nothing shows that a mouse is over it.
        page.mouse.move(0, 0)
        picture = Image.open(io.BytesIO(page.screenshot(style=HIDDEN, animations="disabled")))
        boxes = [element.bounding_box() for element in until]
        ends = [round(box["y"] + box["height"]) + MARGIN for box in boxes if box]
        bottom = min([max(ends, default=TALL), picture.height])
        cropped = picture.crop((left, 0, WIDTH, bottom))
        self.pictures.mkdir(parents=True, exist_ok=True)
        cropped.convert("RGB").quantize(256).save(self.pictures / f"{name}.png", optimize=True)


@pytest.fixture(scope="module")
def shown(
    request: pytest.FixtureRequest,
    make_project: Callable[..., SmallProject],
    serve: Callable[..., AbstractContextManager[Up]],
) -> Iterator[Shown]:
    pictures = request.config.getoption("--screenshots")
    project = make_project()
    if pictures is None:
        (project.root / "prefect.yaml").write_text(DEPLOYMENT)
    else:
        # MLflow shows the folder's name.
        project.root = project.root.with_name("plumbline")
        project.home = project.root / ".plumbline"
        subprocess.run(["git", "clone", "--quiet", ROOT, project.root], check=True)
    with serve(project) as up:
        up.cli("up", *up.options)
        yield Shown(up, "quickstart" if pictures else "tiny", pictures)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    before = set(psutil.Process().children(recursive=True))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()
    started = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not [process for process in alive if "chrom" in process.name()]


@contextmanager
def opened(browser: Browser) -> Iterator[Page]:
    """A page that reaches this machine alone, and fails if it has tried another one."""
    foreign = []

    def gate(route: Route) -> None:
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    context = browser.new_context(
        viewport={"width": WIDTH, "height": HEIGHT},
        color_scheme="light",
        reduced_motion="reduce",
        timezone_id="UTC",
    )
    context.set_default_timeout(PATIENCE)
    context.add_init_script(MLFLOW_FOR_TRAINING)
    context.route("**/*", gate)
    yield context.new_page()
    context.close()
    assert not foreign


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    expect.set_options(timeout=PATIENCE)
    with opened(browser) as page:
        yield page


@pytest.fixture(scope="module")
def first(shown: Shown) -> str:
    """A run of the deployment as it is."""
    run = shown.up.start(f"align/{shown.experiment}")
    shown.up.wait(run, "COMPLETED", seconds=1200)
    return run


@pytest.fixture(scope="module")
def second(shown: Shown, browser: Browser, first: str) -> str:
    """A run that was sent off with the form, under another KL penalty."""
    with opened(browser) as page:
        open_form(shown, page)
        page.get_by_label("kl_coef").fill("0.2")
        with page.expect_response("**/create_flow_run") as answer:
            page.get_by_role("button", name="Submit").click()
        run = str(answer.value.json()["id"])
    shown.up.wait(run, "COMPLETED", seconds=600)
    return run


def open_form(shown: Shown, page: Page) -> None:
    """Go the way of a user: from the start page to the form of a custom run."""
    page.goto(shown.up.prefect)
    page.get_by_role("link", name="Deployments").click()
    page.get_by_role("link", name=shown.experiment, exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    page.get_by_label("kl_coef").wait_for()


def test_the_form_shows_the_fields_and_refuses_bad_values(shown, page):
    open_form(shown, page)
    before = shown.runs()

    # The experiment is one of params/, the steps are the pipeline's.
    page.get_by_role("button", name="Select experiment").click()
    assert shown.experiment in page.get_by_role("option").all_inner_texts()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Select refresh").click()
    assert set(STEPS) <= set(page.get_by_role("option").all_inner_texts())
    page.keyboard.press("Escape")

    # A knob has its meaning and its bounds.
    form = page.locator("form")
    expect(form).to_contain_text("Weight of the KL penalty a token (beta), or its first value.")
    expect(form).to_contain_text("Takes a number >= 0.")

    # A number below its bound stays in the browser.
    kl_coef = page.get_by_label("kl_coef")
    kl_coef.fill("-1")
    submit = page.get_by_role("button", name="Submit")
    submit.click()
    assert kl_coef.evaluate("field => field.validity.rangeUnderflow")

    # What a browser can't tell is said beside the field, once the server was asked.
    kl_coef.fill("0.2")
    page.get_by_label("temperature").fill("0")
    page.get_by_role("button", name="Add item").click()
    overrides = page.get_by_role("group").filter(has=page.get_by_role("button", name="Add item"))
    overrides.last.get_by_role("textbox").fill("rl.gamma")
    submit.click()
    wrong = page.get_by_text("0 is less than or equal to the minimum of 0")
    expect(wrong).to_be_visible()
    expect(form.get_by_text("'rl.gamma' does not match")).to_be_visible()
    assert shown.runs() == before

    page.get_by_text("Run Name").scroll_into_view_if_needed()
    shown.save("custom-run", page, wrong, left=SIDEBAR)


def test_the_page_of_a_run_shows_steps_and_artifacts(shown, second, page):
    page.set_viewport_size({"width": WIDTH, "height": TALL})
    page.goto(f"{shown.up.prefect}/v2/runs/flow-run/{second}")
    expect(page.get_by_text("Completed").first).to_be_visible()
    # Under the name of what was changed, whatever the form has called it.
    expect(page.get_by_text(f"{shown.experiment}-kl0.2", exact=True).first).to_be_visible()

    page.get_by_role("tab", name="Task Runs").click()
    steps = page.get_by_role("tabpanel").get_by_role("listitem")
    # The newest stands first.
    for step in reversed(STEPS):
        step_run = steps.filter(has=page.get_by_role("link", name=re.compile(f"^{step}-")))
        state = "Completed" if step in AFTER_KL_COEF else "Cached"
        expect(step_run.first).to_contain_text(state)
    page.wait_for_timeout(GRAPH_SETTLES if shown.pictures else 0)
    shown.save("run-page", page, step_run.first, left=SIDEBAR)

    page.get_by_role("tab", name="Artifacts").click()
    artifacts = page.get_by_role("tabpanel", name="Artifacts")
    for artifact in ("mlflow", "validation", "scores", "reward-kl", "curves", "report"):
        heading = page.get_by_role("heading", name=artifact, exact=True)
        expect(artifacts.get_by_role("link").filter(has=heading)).to_be_visible()
    shown.save("artifacts", page, artifacts, left=SIDEBAR)

    found = shown.up.artifacts(second)
    page.goto(f"{shown.up.prefect}/v2/artifacts/artifact/{found['curves']['id']}")
    assert is_drawn(page.get_by_role("img", name="artifact-image"))
    page.goto(f"{shown.up.prefect}/v2/artifacts/artifact/{found['report']['id']}")
    report = page.get_by_role("tabpanel")
    expect(report.get_by_role("cell", name="win rate over SFT")).to_be_visible()
    # They are data in the text, and come after it.
    expect(report.get_by_role("img").first).to_be_visible()
    figures = report.get_by_role("img").all()
    assert all(is_drawn(figure) for figure in figures)
    shown.save("report", page, figures[0], left=SIDEBAR)


def is_drawn(image: Locator) -> bool:
    """Whether an image is there, and could be read."""
    return bool(image.evaluate("image => image.decode().then(() => image.naturalWidth > 100)"))


def test_mlflow_shows_the_curves_of_an_rl_step(shown, second, page):
    (step, *_) = shown.tracked("tags.`plumbline.step` = 'rl' and tags.`cache.hit` = 'false'")
    place = f"experiments/{step['experiment_id']}/runs/{step['run_id']}"
    page.goto(f"{shown.up.mlflow}/#/{place}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill(f"^objective/({'|'.join(CURVES)})$")
    for curve in CURVES:
        expect(page.get_by_role("heading", name=curve, exact=True)).to_be_visible()
    charts = page.locator(".js-plotly-plot")
    expect(charts).to_have_count(len(CURVES))
    for chart in charts.all():
        # A line from one point to another.
        line = chart.locator("path.js-line").first
        expect(line).to_have_attribute("d", re.compile(r"^M[-\d.,]+L"))
    shown.save("mlflow-curves", page, charts.first, left=MLFLOW_SIDEBAR)


def test_mlflow_compares_two_runs(shown, first, second, page):
    ids, names, experiment = [], [], ""
    for run in (first, second):
        (found,) = shown.tracked(f"tags.`prefect.flow_run_id` = '{run}'")
        experiment = found["experiment_id"]
        ids.append(found["run_id"])
        names.append(found["run_name"])
    page.set_viewport_size({"width": WIDTH, "height": TALL})
    runs, experiments = quote(json.dumps(ids)), quote(json.dumps([experiment]))
    page.goto(f"{shown.up.mlflow}/#/compare-runs?runs={runs}&experiments={experiments}")
    for name in names:
        expect(page.get_by_role("cell", name=name)).to_be_visible()
    for table in ("Parameters", "Metrics"):
        page.get_by_role("switch", name=f"{table} - Show diff only").click()
    # One param was changed, and what followed from it.
    params = page.get_by_role("table").nth(1).get_by_role("row")
    expect(params).to_have_count(1)
    unchanged = "0.1" if shown.experiment == "quickstart" else "0.05"
    assert sorted(params.get_by_role("cell").all_inner_texts()) == [unchanged, "0.2"]
    # Long tables of params or tags are grids, too.
    kl = page.get_by_role("link", name="eval/policy/kl", exact=True)
    metrics = page.get_by_role("grid").filter(has=kl)
    expect(metrics).to_be_visible()
    expect(metrics.get_by_role("link", name="sft/", exact=False)).to_have_count(0)
    page.get_by_role("button", name="Visualizations").click()
    shown.save("mlflow-compare", page, metrics, left=MLFLOW_SIDEBAR)

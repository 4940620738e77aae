"""Pages in a real browser: whole, silent, self-contained, usable by keyboard and on a phone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.planner import Attempt, GridVerifier, PlannerResult
from arctrm.report.pages import (
    SHOWN,
    SHOWN_IN_GALLERY,
    evaluation_page,
    solution_page,
    tasks_page,
)
from arctrm.solve import scoring
from arctrm.solve.questions import Key
from arctrm.solve.rank import Ranked
from arctrm.solve.report import write_gallery
from arctrm.solve.solution import Answer, Event, Solution
from helpers import random_grid, random_task

HARMFUL = '<img src=x onerror="document.title=1"></script>'
STEPS = 3  # supervision steps of the refinement shown


def ranked(rng, count, side=4):
    """Distinct grids with all kinds of evidence, the first the likeliest."""
    return [
        Ranked(
            random_grid(rng, side, side),
            votes=2.0,
            mean_q=-n,
            votes_by={"reader": 1.0, "joint": 1.0},
            views_by={"reader": (n,), "joint": (n,)},
            reader_scores=(-1.0 - n,),
            inverse_scores=(-2.0,),
            broken=("same colours",),
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def solution():
    """A task of the public set with two test inputs, candidates, refinement, planner, time."""
    rng = np.random.default_rng(0)
    task = next(t for t in load_tasks("training") if len(t.test) == 2)
    grids = [pair.output for pair in task.demonstrations]
    broken = np.array(grids[0])
    broken[0, 0] = (broken[0, 0] + 1) % 10
    verdict = GridVerifier(demonstrations=task.demonstrations).verify(
        [broken, *grids[1:]], grids[0]
    )
    attempts = (Attempt(1, "text", 12, verdict, torch.zeros(1)),)
    steps = [random_grid(rng, 4, 5) for _ in range(STEPS)]
    answers = tuple(
        Answer(
            pair.input,
            ranked(rng, SHOWN + 2),
            40,
            PlannerResult(attempts),
            {"trm": (None, *steps), "joint": (steps[-1], *steps)},
        )
        for pair in task.test
    )
    events = (Event("reading", 0.0, 2.0), Event("judging", 2.0, 1.0))
    return Solution(task.without_answers(), answers, 1.0, 40, 3.0, False, events)


def num_grids(solution):
    """Demonstrations; input, attempts, candidates, steps, the planner's answer and probes."""
    pairs = 2 * len(solution.task.demonstrations)
    each = 1 + 2 + SHOWN + 2 * (STEPS + 1) + 1 + len(solution.task.demonstrations)
    return pairs + len(solution.answers) * each


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_solved_task_shows_every_grid_on_any_screen(opened, solution, width, scheme):
    html = solution_page(solution, [(True, False)] * 2, "weights")
    page = opened(html, width, scheme=scheme)
    assert page.locator("svg.grid").count() == num_grids(solution)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    text = page.inner_text("main")
    for words in (
        "likely right",
        "place 1 by votes",
        "1 for the reader",
        "2.0 s",
        "kept",
        "40 pro",
    ):
        assert words in text
    assert len(html.encode()) <= 300_000
    assert solution.to_html().count("<svg") == html.count("<svg")


def test_the_slider_shows_step_after_step(opened, solution):
    page = opened(solution.to_html())
    box = page.locator(".refined").first
    shown = lambda: box.locator("figure:visible figcaption").all_inner_texts()
    assert shown() == [f"step {STEPS} of {STEPS}, {20 - same(solution)} cells changed"]
    box.locator("input").focus()
    for _ in range(STEPS):
        page.keyboard.press("ArrowLeft")
    assert shown() == ["hidden cells"]
    page.keyboard.press("ArrowRight")
    assert shown() == [f"step 1 of {STEPS}"]
    assert page.locator(".refined").nth(1).locator("figure:visible").count() == 1


def same(solution):
    """Cells that the last step of TRM left alone."""
    *_, last, now = solution.answers[0].refined["trm"]
    return int((last == now).sum())


def test_light_and_dark_by_system_and_by_key(opened, solution):
    page = opened(solution.to_html(), scheme="dark")
    paper = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = paper()
    page.keyboard.press("t")
    light = paper()
    assert dark != light
    page.locator("#theme").click()
    assert paper() == dark


def test_an_invariant_that_is_about_cells_shows_them(opened):
    grid = lambda rows: np.array(rows, np.uint8)
    pairs = [Pair(grid([[c, 0], [0, c]]), grid([[c, 0], [0, 0]])) for c in (3, 4, 5)]
    given, made = grid([[6, 0], [0, 6]]), grid([[6, 8], [8, 0]])
    one = Ranked(made, 1.0, 0.0, {"reader": 1.0}, {"reader": (0,)}, broken=("no new colour",))
    task = Task("small", tuple(pairs), (Pair(given),))
    page = opened(solution_page(Solution(task, (Answer(given, [one], 1),))))
    chip, dots = page.locator("button[data-mark]"), page.locator(".mark:visible path")
    assert dots.count() == 0
    chip.focus()
    page.keyboard.press("Enter")
    assert [path.get_attribute("d") for path in dots.all()] == ["M1 0h0M0 1h0"] * 2
    assert chip.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    assert dots.count() == 0


# -- the gallery


def evaluated(rng, count=12):
    """Tasks of four kinds in turn: solved, near miss, wrong size, wrong; and what was proposed."""
    tasks, found = [random_task(rng, f"task{n:02}", side=5) for n in range(count)], {}
    for number, task in enumerate(tasks):
        answer = task.test[0].output
        near, wrong = np.array(answer), (answer + 1) % 10
        near[0, 0] = (near[0, 0] + 1) % 10
        best = (answer, near, answer[:3], wrong)[number % 4]
        found[Key(task.id, 0)] = [
            replace(one, grid=np.ascontiguousarray(grid))
            for one, grid in zip(ranked(rng, 2), (best, task.test[0].input), strict=True)
        ]
    return tasks, found


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    tasks, found = evaluated(np.random.default_rng(0))
    path = tmp_path_factory.mktemp("gallery") / "page.html"
    write_gallery(path, {"checkpoint": HARMFUL}, tasks, found, scoring.answers(tasks))
    return path.read_text(encoding="utf-8")


def test_the_gallery_filters_by_result_voice_and_id(opened, gallery):
    page = opened(gallery)
    cards = page.locator(".card:visible")
    assert cards.count() == 12
    for status in ("solved", "near", "size", "wrong"):
        page.locator(f"[data-filter=status][value={status}]").click()
        assert cards.count() == 3
        assert {card.get_attribute("data-status") for card in cards.all()} == {status}
    assert page.locator("#count").inner_text() == "3 of 12 tasks"
    page.locator("[data-filter=status][value='']").click()
    page.locator("[data-filter=voice][value=both]").click()
    assert {card.get_attribute("data-status") for card in cards.all()} == {"solved"}
    page.locator("[data-filter=voice][value='']").click()
    page.keyboard.press("/")
    page.keyboard.type("task07")
    assert [card.get_attribute("id") for card in cards.all()] == ["task07"]
    assert page.evaluate("location.hash") == "#search=task07"


def test_the_keyboard_goes_from_task_to_task_and_opens_one(opened, gallery):
    page = opened(gallery)
    here = lambda: page.evaluate("document.activeElement.id")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert here() == "task01"
    page.keyboard.press("k")
    assert here() == "task00"
    assert page.locator("#task00 .candidate:visible").count() == 0
    page.keyboard.press("Enter")
    page.locator("#task00 .candidate:visible").first.wait_for()
    assert page.locator("#task00 .candidate:visible").count() == 2
    assert page.locator("#task00 svg.grid").count() == 3 + 2 * 3 + 2
    assert "the right one is number 1" in page.inner_text("#task00")


def test_the_gallery_has_scores_and_the_curve(opened, gallery):
    page = opened(gallery, 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".tile").first.inner_text().split() == ["25.0", "1", "attempt"]
    curves = page.locator(".curve")
    assert [curve.locator("circle").count() for curve in curves.all()] == [2, 2, 1]


def test_text_from_outside_is_only_text(opened, gallery):
    task = random_task(np.random.default_rng(0), HARMFUL)
    page = opened(tasks_page(HARMFUL, [task, task]))
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == HARMFUL
    assert page.title() == f"{HARMFUL} · arctrm"
    assert HARMFUL in opened(gallery).inner_text("header")


def test_where_no_answer_is_known_the_gallery_has_no_scores():
    tasks, found = evaluated(np.random.default_rng(0), 1)
    own = {task.id: [found[Key(task.id, 0)]] for task in tasks}
    html = evaluation_page({}, {}, tasks, own, {"task00": [None]}, {"task00": [(None, None)]}, {})
    assert "answer not known" in html
    assert 'class="tile"' not in html


@pytest.mark.slow
def test_four_hundred_tasks_are_eight_megabytes_at_most(opened, tmp_path):
    tasks = load_tasks("evaluation")
    rng, found = np.random.default_rng(0), {}
    for task in tasks:
        for index, pair in enumerate(task.test):
            cut = [pair.output, pair.input, *(np.roll(pair.output, n, 1) for n in (1, 2, 3))]
            both = zip(ranked(rng, SHOWN_IN_GALLERY), cut, strict=True)
            found[Key(task.id, index)] = [replace(one, grid=grid) for one, grid in both]
    write_gallery(tmp_path / "all.html", {}, tasks, found, scoring.answers(tasks))
    html = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert len(html.encode()) <= 8_000_000
    assert opened(html).locator(".card").count() == 400

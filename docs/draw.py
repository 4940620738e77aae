"""The pictures of the documentation as SVG, by `python docs/make.py`.

Sizes are in pixels. Colours follow the reader's light or dark setting.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from math import log10
from pathlib import Path
from typing import Any

import numpy as np

from arctrm.report.pictures import GRID_STYLE, HIDDEN, grid_svg

ROOT = Path(__file__).parents[1]
STYLE = """
svg{--bg:#fff;--ink:#1f2328;--soft:#656d76;--rule:#d0d7de;--fill:#f2f4f7}
@media(prefers-color-scheme:dark){
svg{--bg:#0d1117;--ink:#e6edf3;--soft:#9198a1;--rule:#3d444d;--fill:#1c222b}}
text{font:14px system-ui,sans-serif;fill:var(--ink)}
.soft{fill:var(--soft);font-size:12px}.bold{font-weight:600}
.mid{text-anchor:middle}.end{text-anchor:end}
.bg{fill:var(--bg)}.box{fill:var(--fill);stroke:var(--rule)}
.rule{stroke:var(--rule);fill:none}.line{stroke:var(--soft);stroke-width:1.5;fill:none}
.reader{fill:#1e93ff}.trm{fill:#ff851b}.rank{fill:#2a9d8f}.pale{opacity:.25}
.arrow{fill:var(--soft)}
"""
START, END, ROW, SEPARATOR = "START", "END", "row", "SEP"
SMALL_INPUT, SMALL_OUTPUT = [[8, 0, 3], [0, 8, 0]], [[3, 0, 8], [0, 8, 0]]


def pictures(systems: dict[str, Any]) -> dict[str, str]:
    """Name -> SVG."""
    return {
        "task": task(),
        "systems": chart(systems["system"]),
        "layout": layout(),
        "trunk": trunk(),
        "reader": reader(),
        "trm": trm(),
        "coupling": coupling(),
        "ranking": ranking(),
    }


# --- Parts


def svg(width: float, height: float, says: str, parts: Iterable[str]) -> str:
    """The picture; `says` is read out where it cannot be seen."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    paper = f'<rect class="bg" width="{width:g}" height="{height:g}"/>'
    body = "\n".join([paper, *parts])
    style = STYLE + GRID_STYLE
    return f"{head}\n<title>{escape(says)}</title>\n<style>{style}</style>\n{body}\n</svg>\n"


def text(x: float, y: float, words: object, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(str(words))}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str = "box", more: str = "") -> str:
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {size} class="{kind}" {more}/>'


def box(x: float, y: float, width: float, height: float, *lines: str) -> str:
    """A box with centred lines, the first one bold."""
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    shown = [
        text(x + width / 2, top + 18 * n, line, "mid soft" if n else "mid bold")
        for n, line in enumerate(lines)
    ]
    return "\n".join([rect(x, y, width, height, "box", 'rx="6"'), *shown])


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A straight line with a head; level or upright."""
    dx, dy = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
    tip = f"{to_x:g},{to_y:g}"
    wings = " ".join(
        f"{to_x - 8 * dx + 4 * side * dy:g},{to_y - 8 * dy + 4 * side * dx:g}" for side in (-1, 1)
    )
    line = f'<path class="line" d="M{x:g},{y:g}L{to_x - 6 * dx:g},{to_y - 6 * dy:g}"/>'
    return f'{line}<polygon class="arrow" points="{tip} {wings}"/>'


def grid(x: float, y: float, cells: Sequence[Sequence[int]], side: int = 16) -> str:
    """A grid as on the pages of `--report`."""
    shown = np.array(cells, dtype=np.uint8)
    return f'<g transform="translate({x:g} {y:g})">{grid_svg(shown, side * max(shown.shape))}</g>'


# --- README


def task() -> str:
    """The example: demonstrations, test input, and the two grids of the bundled weights."""
    known = json.loads((ROOT / "examples/45737921.json").read_text(encoding="utf-8"))
    answers = json.loads((ROOT / "docs/pictures/submission.json").read_text(encoding="utf-8"))
    attempts = next(iter(answers.values()))[0]
    side, x, parts = 9, 20, []
    for number, pair in enumerate(known["train"], 1):
        height, width = len(pair["input"]), len(pair["input"][0])
        parts += [text(x, 24, f"demonstration {number}", "soft")]
        parts += [grid(x, 34, pair["input"], side)]
        parts += [grid(x, 52 + side * height, pair["output"], side)]
        middle = x + side * width / 2
        parts += [arrow(middle, 36 + side * height, middle, 50 + side * height)]
        x += max(side * width, 100) + 24
    parts += [f'<path class="rule" d="M{x:g},14V290"/>']
    x += 24
    asked = known["test"][0]["input"]
    big = 17
    shown = [("test input", asked), *attempts.items()]
    if attempts["attempt_1"] == attempts["attempt_2"]:
        shown[1:] = [("attempt_1 and attempt_2", attempts["attempt_1"])]
    for title, cells in shown:
        parts += [text(x, 24, title, "bold"), grid(x, 34, cells, big)]
        x += max(big * len(cells[0]), 180) + 30
    return svg(x, 300, "A task, and the two answers of the bundled weights", parts)


def dollars(system: dict[str, Any]) -> float:
    return system.get("dollars", 3 * system["hours"])


def chart(systems: Sequence[dict[str, Any]]) -> str:
    """Score against dollars of training, the dollars in powers of ten."""
    left, top, width, height = 60, 20, 640, 300
    low, high, least, most = 0.3, 2000, 35, 70
    at_x = lambda cost: left + width * log10(cost / low) / log10(high / low)
    at_y = lambda score: top + height * (most - score) / (most - least)
    parts = []
    for score in range(40, most + 1, 10):
        y = at_y(score)
        parts += [f'<path class="rule" d="M{left},{y:g}H{left + width}"/>']
        parts += [text(left - 8, y + 4, f"{score} %", "soft end")]
    for cost in (1, 10, 100, 1000):
        x = at_x(cost)
        parts += [f'<path class="rule" d="M{x:g},{top}V{top + height}"/>']
        parts += [text(x, top + height + 18, f"${cost:,}", "soft mid")]
    places = {"right": (11, 5, ""), "above": (0, -13, "mid"), "below": (0, 23, "mid")}
    for system in systems:
        x, y, own = at_x(dollars(system)), at_y(system["score"]), system["name"] == "arctrm"
        dx, dy, kind = places[system["label"]]
        parts += [f'<circle class="{"rank" if own else "trm"}" cx="{x:g}" cy="{y:g}" r="6"/>']
        words = f"{system['name']} {system['score']:g}"
        parts += [text(x + dx, y + dy, words, f"{kind} {'bold' if own else ''}")]
    said = "dollars of training at $3 a GPU-hour (mdlARC: its author's figure)"
    parts += [text(left + width / 2, top + height + 42, said, "soft mid")]
    title = "ARC-AGI-1 public evaluation, two attempts, against the cost of training"
    return svg(left + width + 30, top + height + 56, title, parts)


def results_table(systems: dict[str, Any]) -> str:
    """The rows of the README, the best score for the money first."""
    head = "| system | weights | training | two attempts | by |\n|---|---|---|---|---|\n"
    rows = []
    for system in systems["system"]:
        if system.get("table"):
            cost = dollars(system)
            money = f"${cost:,.2f}" if cost < 10 else f"${cost:,.0f}"
            name, score = f"[{system['name']}]({system['source']})", f"{system['score']:g}"
            score = f"**{score}**" if system["name"] == "arctrm" else score
            hours = f"{system['hours']:g} {system['gpu']}-hours, {money}"
            rows.append(f"| {name} | {system['size']} | {hours} | {score} | {system['by']} |\n")
    return head + "".join(rows)


# --- How it works


def tokens(x: float, y: float, words: Sequence[object], side: float = 34) -> str:
    """A row of tokens: colours as cells, marks as words."""
    parts = []
    for n, word in enumerate(words):
        at = x + n * (side + 3)
        if isinstance(word, int):
            parts += [grid(at, y, [[word]], side)]
        else:
            parts += [rect(at, y, side, side, "box", 'rx="4"')]
            parts += [f'<text x="{at + side / 2:g}" y="{y + side / 2 + 4:g}" class="mid"']
            parts[-1] += f' style="font-size:9px">{word}</text>'
    return "\n".join(parts)


def pair_tokens() -> list[object]:
    """The small pair, as the trunk reads it."""
    written: list[object] = [START]
    for cells, end in ((SMALL_INPUT, SEPARATOR), (SMALL_OUTPUT, END)):
        for row in cells:
            written += [*row, ROW]
        written[-1:] = [ROW, end]
    return written


def layout() -> str:
    """A pair, its tokens with their places, and three views of a grid."""
    parts = [text(20, 24, "a pair", "bold"), grid(20, 36, SMALL_INPUT, 22)]
    parts += [arrow(94, 58, 116, 58), grid(124, 36, SMALL_OUTPUT, 22)]
    words = pair_tokens()
    parts += [text(20, 114, "its tokens, and where each stands: (part, row, column)", "bold")]
    parts += [tokens(20, 126, words)]
    place = {1: "(0, 0, 0)", 6: "(0, 1, 1)", 10: "(1, 0, 0)", 15: "(1, 1, 1)"}
    for index, said in place.items():
        parts += [text(20 + 37 * index + 17, 178, said, "soft mid")]
    parts += [text(260, 24, "views of the input", "bold")]
    views = (
        ("turned", [list(row) for row in zip(*SMALL_INPUT[::-1], strict=True)]),
        ("mirrored", [row[::-1] for row in SMALL_INPUT]),
        ("recoloured", [[{8: 2, 3: 4}.get(c, c) for c in row] for row in SMALL_INPUT]),
    )
    for n, (name, cells) in enumerate(views):
        x = 260 + 150 * n
        parts += [grid(x, 36, cells, 16), text(x + 16 * len(cells[0]) + 10, 58, name, "soft")]
    return svg(740, 192, "A pair becomes one row of tokens; a view has an exact inverse", parts)


def trunk() -> str:
    """Four blocks, gone through three times, the embedding injected before each."""
    parts = [box(20, 170, 150, 60, "embedding", "cell + place + vectors")]
    for n in range(4):
        y = 190 - 50 * n
        parts += [box(290, y, 170, 38, f"block {n + 1}")]
        parts += [
            f'<path class="line" d="M170,200H230V{y + 19}"/>',
            arrow(230, y + 19, 288, y + 19),
        ]
        if n:
            parts += [arrow(375, y + 50, 375, y + 40)]
    parts += [text(236, 245, "injection, a matrix for each", "soft")]
    parts += ['<path class="line" d="M462,59H510V209"/>', arrow(510, 209, 464, 209)]
    parts += [text(520, 138, "3 times", "bold"), text(520, 156, "through all four", "soft")]
    parts += [
        arrow(375, 38, 375, 16),
        text(388, 22, "heads: next token, own cell, halting", "soft"),
    ]
    return svg(720, 258, "The trunk: a looped LLaMA with input injection", parts)


def mask(x: float, y: float, sees: Any, kind: str, side: float = 15) -> str:
    """Which of the tokens (columns) a token (row) sees."""
    words = pair_tokens()
    count = len(words)
    parts = [rect(x, y, side * count, side * count, "box")]
    for row in range(count):
        for column in range(count):
            if sees(row, column):
                at = (x + side * column + 1, y + side * row + 1, side - 2, side - 2)
                parts += [rect(*at, kind)]
    return "\n".join(parts)


def reader() -> str:
    """What an input token and an output token of the reader see."""
    split = pair_tokens().index(SEPARATOR) + 1
    parts = [text(150, 24, "keys: the tokens of the pair", "soft")]
    parts += [mask(150, 34, lambda r, c: c < split or (r >= split and c <= r), "reader")]
    parts += [text(140, 110, "input", "end bold"), text(140, 240, "output", "end bold")]
    parts += [text(460, 100, "input tokens see the whole input", "")]
    parts += [text(460, 230, "output tokens see the input", "")]
    parts += [text(460, 250, "and what stands before them", "")]
    return svg(720, 336, "Attention of the reader voice: input whole, output causal", parts)


def trm() -> str:
    """Supervision steps: hidden cells become an answer."""
    steps = (
        [[HIDDEN] * 4] * 4,
        [[8, 8, HIDDEN, 4], [4, 8, HIDDEN, 4], [4, HIDDEN, 8, 4], [8, 8, 4, HIDDEN]],
        [[8, 8, 4, 4], [4, 8, 8, 4], [4, 8, 8, 4], [8, 8, 4, 4]],
        [[8, 4, 4, 8], [4, 8, 8, 4], [4, 8, 8, 4], [8, 4, 4, 8]],
    )
    said = ("y hidden", "step 1", "step 2", "step 3")
    parts = []
    for n, (cells, name) in enumerate(zip(steps, said, strict=True)):
        x = 20 + 180 * n
        parts += [text(x, 24, name, "bold"), grid(x, 36, cells, 26)]
        if n < 3:
            parts += [arrow(x + 112, 88, x + 172, 88), text(x + 142, 80, "y, z", "soft mid")]
        q = ("", "q = -3", "q = -0.5", "q = 4")[n]
        parts += [text(x, 160, q, "soft")]
    parts += [text(20, 190, "The same trunk runs in every step; all cells see all cells.", "soft")]
    return svg(720, 204, "TRM refines a whole answer in supervision steps", parts)


def coupling() -> str:
    """Reader, TRM, planner and verifier around one task."""
    parts = [box(20, 60, 150, 70, "reader", "writes a draft")]
    parts += [box(300, 60, 150, 70, "TRM", "refines it")]
    parts += [box(570, 60, 150, 70, "candidates", "to the ranking")]
    parts += [arrow(170, 82, 298, 82), text(234, 74, "draft, size, states", "soft mid")]
    parts += [arrow(298, 112, 172, 112), text(234, 128, "answers to follow", "soft mid")]
    parts += [arrow(450, 95, 568, 95)]
    parts += [box(290, 190, 170, 70, "verifier", "held-out demonstrations")]
    parts += [arrow(375, 130, 375, 188), text(385, 164, "answer to a demonstration", "soft")]
    parts += ['<path class="line" d="M290,225H95V140"/>', arrow(95, 160, 95, 132)]
    parts += [text(106, 244, "what is wrong: size, colours, cells", "soft")]
    parts += [text(20, 34, "an attempt of the planner", "bold")]
    return svg(740, 276, "Reader and TRM, and the planner's attempts", parts)


def ranking() -> str:
    """Three candidates; votes, the reader, invariants, and the order that comes out."""
    grids = ([[3, 0, 8], [0, 8, 0]], [[3, 0, 8], [0, 8, 8]], [[8, 0, 3], [0, 8, 0]])
    votes, likely, broken = (40, 18, 6), (1.0, 0.62, 0.2), ("none", "count of 8", "changes nothing")
    head = ((20, "candidate"), (130, "votes"), (300, "log-probability"), (500, "broken invariants"))
    parts = [text(x, 24, word, "bold") for x, word in head]
    for n, cells in enumerate(grids):
        y = 40 + 62 * n
        parts += [grid(20, y, cells, 22), rect(130, y + 12, 3 * votes[n], 20, "trm")]
        parts += [text(136 + 3 * votes[n], y + 27, votes[n], "soft")]
        parts += [rect(300, y + 12, 150 * likely[n], 20, "reader"), text(500, y + 27, broken[n])]
        last = "attempt_1" if n == 0 else "attempt_2" if n == 1 else "last: a copy of the input"
        parts += [text(620 if n < 2 else 500, y + (27 if n < 2 else 45), last, "soft")]
    return svg(720, 226, "Candidates are ordered by votes, likelihood and invariants", parts)

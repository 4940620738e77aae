"""Grids in text, both ways, and readers of grids behind `TextReasoningModule`.

The last well-formed grid of an answer wins, because models think first and answer last; one under a
line that says "input" is no answer. A block of rows is taken whole or not at all: where it is
ragged, cut off or has a cell that is no digit, none of its parts is a grid. Legend: B texts, P
prefix vectors, D width.
"""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arctrm.data.parse import parse_grid
from arctrm.data.task import Grid, Pair
from arctrm.errors import ConfigError, TaskError
from arctrm.model import layout
from arctrm.model.attention import spans
from arctrm.model.layout import CHOICES, PREFIX, SIDE, Condition, Prompt, pack_position
from arctrm.model.trunk import Trunk
from arctrm.reader import grammar
from arctrm.reader.decoding import decode
from arctrm.reader.hub import with_soft
from arctrm.reader.hub_prompts import grid_text as grid_text

NESTED = re.compile(r"\[\s*(\[[^\[\]]*\](?:\s*,?\s*\[[^\[\]]*\])*)\s*,?\s*\]")  # a list of lists
TABLE_RULE = re.compile(r"^[|:+\s-]*\|[|:+\s-]*\n", re.MULTILINE)  # in Markdown
WORDS = r"\b(input|output|answer|prediction|solution|result)(?:\s+grid)?(?:\s*#?\d+)?"
LABEL = re.compile(rf"(?:\W*\w+){{0,4}}?\W*{WORDS}\W*", re.IGNORECASE)  # says what comes
PREFIXED = re.compile(rf"\W*(?:{WORDS}|row\s*\d+|line\s*\d+)\W*[:=]\s*(?=[\d\[])", re.IGNORECASE)
CELL_LIKE = re.compile(r"[\[\]\"']*(?:.?|[-+]?\d+(?:\.\d+)?|(?=\w*\d)\w+)[\[\]\"']*")


def parse_grid_text(text: str) -> Grid | None:
    """The answer in a model's text, uint8 [1..30, 1..30]; None when there is no grid in it."""
    lists = lambda found: re.findall(r"\[[^\[\]]*\]", found[1])
    as_lines = lambda found: "\n".join(["\n", *(" ".join(x.split()) for x in lists(found)), "\n"])
    text = NESTED.sub(as_lines, TABLE_RULE.sub("", text))
    answer, label, word = None, "", ""
    block: list[list[str] | None] = []
    for line in [*text.splitlines(), ""]:
        prefix = PREFIXED.match(line)
        row, is_row = _row(line[prefix.end() :] if prefix else line)
        if is_row:
            if not block:
                said = LABEL.fullmatch(label)
                word = (prefix and prefix[1]) or (said[1] if said else "")
            block.append(row)
            continue
        if block:
            if word.lower() != "input":
                with suppress(TaskError):
                    rows = [[int(cell) for cell in own or ()] for own in block]
                    answer = parse_grid(rows, "answer")
            block, label = [], ""
        if line.strip() and not line.strip().startswith("```"):
            label = line
    return answer


def _row(line: str) -> tuple[list[str] | None, bool]:
    """(cells, whether the line stands for a row); None where they are no digits."""
    body = line.strip().removesuffix(",").strip("|\"' \t")
    bracketed = body.startswith("[") and body.endswith("]")
    cells = re.split(r"[\s,|;]+", body[1:-1].strip() if bracketed else body)
    if not bracketed and len(cells) == 1 and body.isascii() and body.isdigit():
        return list(body), True
    if all(re.fullmatch("[0-9]", cell) for cell in cells):
        return cells, True
    return None, bool(body) and all(CELL_LIKE.fullmatch(cell) for cell in cells)


def pairs_in_text(text: str, name: str) -> list[Pair]:
    """The pairs that a text shows, the last of them without an output: rows of digits after lines
    that say "input" or "output"; every other line is passed over. Raises UserError without any.
    """
    grids: list[tuple[str, list[list[int]]]] = []
    for line in text.splitlines():
        label = re.fullmatch(r"\W*(input|output)\W*", line, re.IGNORECASE)
        if label is not None:
            grids.append((label[1].lower(), []))
        elif re.fullmatch(r"\s*[0-9](?:\s*[0-9])*\s*", line):
            grids = grids or [("input", [])]
            grids[-1][1].append([int(c) for c in line if c.isdigit()])
    if grids and grids[-1] == ("output", []):
        grids.pop()
    kinds = [kind for kind, _ in grids]
    if kinds[-1:] != ["input"] or kinds != ["input", "output"] * (len(kinds) // 2) + ["input"]:
        raise ConfigError(
            f"{name}: reads rows of digits after the words input and output only, inputs and "
            "outputs in turn and an input last; give such a text or use a reader from the hub"
        )
    read = [parse_grid(rows, f"{name}: grid {i}") for i, (_, rows) in enumerate(grids)]
    return [Pair(*both) for both in zip(read[::2], [*read[1::2], None], strict=True)]


class GridText:
    """A `Reader` behind `TextReasoningModule`: what it is asked and what it writes are grids.

    New tokens are choices. `condition` says which task and view a text is of.
    """

    max_tokens = sys.maxsize

    def __init__(self, reader: Any, condition: Condition = Condition(keeps_colours=1)):
        self.reader, self.condition, self.name = reader, condition, reader.name
        self.device, self.width = reader.device, reader.width
        self.trunk: Trunk | None = getattr(reader, "trunk", None)  # a hub model has none
        self.weights = self.trunk or reader

    def text_prompt(self, text: str) -> Prompt:
        """The prompt that asks for the output of the last input of a text."""
        *pairs, asked = pairs_in_text(text, self.name)
        return self.reader.prompt(asked.input, self.condition, pairs)

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Prompt], prefix: Tensor | None, max_length: int
    ) -> list[list[int]]:
        """At most `max_length` new tokens of each prompt, `prefix` [B, P, D] read behind it:
        greedily, in the grammar of grids, without the end.
        """
        new: list[list[int]] = [[] for _ in prompts]
        if self.trunk is None or prefix is None:
            if not max_length:
                return new
            done = decode(self.reader, with_soft(prompts, prefix), max_output_tokens=max_length)
            return [[choice for choice in one.choices if choice != grammar.END] for one in done]
        # No store of the trunk knows soft prefixes, so all tokens are read for every new one.
        state = grammar.start(len(prompts), self.device)
        for _ in range(max_length):
            logits = self.trunk.grid_logits(self.latents(prompts, prefix, new))
            choice = grammar.log_probabilities(logits, state).argmax(-1)
            state = grammar.advance(state, choice)
            for own, one, ended in zip(new, choice.tolist(), state.finished.tolist(), strict=True):
                own += [] if ended else [one]
            if bool(state.finished.all()):
                break
        return new

    def latents(
        self, prompts: Sequence[Prompt], prefix: Tensor | None, new: Sequence[Sequence[int]]
    ) -> Tensor:
        """State float32 [B, D] of the last of prompt, prefix and new tokens; differentiable."""
        if self.trunk is not None:
            return _trunk_latents(self.trunk, prompts, prefix, new)
        ids = [[self.reader.spelling.choices[choice] for choice in own] for own in new]
        return self.reader.last_states(with_soft(prompts, prefix), ids)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of new tokens."""
        return "".join("\n" if token == grammar.ROW_END else str(token) for token in tokens)


def _trunk_latents(
    trunk: Trunk, prompts: Sequence[Prompt], prefix: Tensor | None, new: Sequence[Sequence[int]]
) -> Tensor:
    """State [B, D] of the last token; the prefix is added to PREFIX tokens behind the separator."""
    count, device = 0 if prefix is None else prefix.shape[1], trunk.device
    marks = pack_position(layout.SEPARATOR_PART) + 1 + np.arange(count).clip(max=SIDE - 2)
    shown, places = [], []
    for prompt, own in zip(prompts, new, strict=True):
        y = np.cumsum([0, *(choice == grammar.ROW_END for choice in own)])[:-1]
        x = np.arange(len(own)) - np.searchsorted(y, y)
        shown.append([*prompt.tokens, *[PREFIX] * count, *(CHOICES[choice] for choice in own)])
        places += [*prompt.positions, *marks, *((layout.OUTPUT_PART * SIDE + y) * SIDE + x)]
    tokens = torch.tensor([token for own in shown for token in own], device=device)
    positions = torch.tensor(np.array(places, dtype=np.int64), device=device)
    length = torch.tensor([len(own) for own in shown], device=device)
    rows = torch.tensor([prompt.condition for prompt in prompts], device=device)
    added = trunk.condition(rows).repeat_interleave(length, 0)
    if prefix is not None:
        place = (tokens == PREFIX).nonzero()[:, 0]
        added = added.index_add(0, place, prefix.flatten(0, 1).to(added))
    offsets = torch.nn.functional.pad(length.cumsum(0), (1, 0)).int()
    read = torch.tensor([len(prompt.tokens) for prompt in prompts], device=device)
    seen = spans(offsets, int(length.max()), trunk.dtype, read)
    hidden = trunk.hidden(trunk.embed(tokens, added), positions, seen)
    return hidden[offsets[1:].long() - 1].float()

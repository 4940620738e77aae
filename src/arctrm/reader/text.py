"""Grids in text, both ways, and readers of grids behind `TextReasoningModule`.

A model's answer may hold JSON, spaced, unspaced or comma-separated digits, prose around them. The
last well-formed grid wins, because models think first and answer last; a grid under a line that
says "input" is no answer. A block of rows is taken whole or not at all: where it is ragged, cut off
or has a cell that is no digit, none of its parts is a grid.

Legend: B texts, P prefix vectors, D width, 12 choices.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arctrm.data.parse import parse_grid
from arctrm.data.task import MAX_SIDE, Grid, Pair
from arctrm.errors import ConfigError, TaskError
from arctrm.model.attention import spans
from arctrm.model.layout import (
    CHOICES,
    OUTPUT_PART,
    PREFIX,
    SEPARATOR_PART,
    SIDE,
    Condition,
    Prompt,
    pack_position,
)
from arctrm.model.trunk import Trunk
from arctrm.reader import grammar
from arctrm.reader.decoding import decode
from arctrm.reader.hub import with_soft
from arctrm.reader.hub_prompts import grid_text as grid_text

NESTED = re.compile(r"\[\s*(\[[^\[\]]*\](?:\s*,?\s*\[[^\[\]]*\])*)\s*,?\s*\]")
"""A list of lists, as JSON, Python and numpy write it."""
TABLE_RULE = re.compile(r"^[|:+\s-]*\|[|:+\s-]*\n", re.MULTILINE)
"""The line under the head of a Markdown table."""
WORDS = r"\b(input|output|answer|prediction|solution|result)(?:\s+grid)?(?:\s*#?\d+)?"
LABEL = re.compile(rf"(?:\W*\w+){{0,4}}?\W*{WORDS}\W*", re.IGNORECASE)
"""A line that only says what comes next."""
PREFIXED = re.compile(rf"\W*(?:{WORDS}|row\s*\d+|line\s*\d+)\W*[:=]\s*(?=[\d\[])", re.IGNORECASE)
"""What may stand before the cells on a line of its own."""
CELL_LIKE = re.compile(r"[\[\]\"']*(?:.?|[-+]?\d+(?:\.\d+)?|(?=\w*\d)\w+)[\[\]\"']*")
"""A cell, or a cell with something wrong in it."""


def parse_grid_text(text: str) -> Grid | None:
    """The answer in a model's text, uint8 [1..30, 1..30]; None when there is no grid in it."""
    text = NESTED.sub(_as_lines, TABLE_RULE.sub("", text))
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
            grid = _checked(block)
            if grid is not None and word.lower() != "input":
                answer = grid
            block, label = [], ""
        if line.strip() and not line.strip().startswith("```"):
            label = line
    return answer


def _as_lines(found: re.Match[str]) -> str:
    rows = re.findall(r"\[[^\[\]]*\]", found[1])
    return "\n\n" + "".join(" ".join(row.split()) + "\n" for row in rows) + "\n"


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


def _checked(rows: Sequence[list[str] | None]) -> Grid | None:
    try:
        return parse_grid([[int(cell) for cell in row or ()] for row in rows], "answer")
    except TaskError:
        return None


def pairs_in_text(text: str, name: str) -> list[Pair]:
    """The pairs that a text shows, the last of them without an output: rows of digits after lines
    that say "input" or "output"; every other line is passed over.

    Raises:
        ConfigError: there is no such pair at the end, or a grid has more than 30 rows or columns.
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
    try:
        read = [
            parse_grid(rows, f"{name}: grid {i} of the text") for i, (_, rows) in enumerate(grids)
        ]
    except TaskError as error:
        raise ConfigError(f"{error}; allowed are grids of up to {MAX_SIDE}x{MAX_SIDE}") from error
    outputs = [*read[1::2], None]
    return [Pair(seen, output) for seen, output in zip(read[::2], outputs, strict=True)]


class GridText:
    """A reader of grids that follows `TextReader`: what it is asked and what it writes are grids.

    New tokens are choices. `condition` says which task and view a text is of; `reader`: a `Reader`.
    """

    def __init__(self, reader: Any, condition: Condition = Condition(keeps_colours=1)):
        self.reader, self.condition, self.name = reader, condition, reader.name
        self.device, self.width = reader.device, reader.width
        self.trunk: Trunk | None = getattr(reader, "trunk", None)  # a hub model has none

    @property
    def trains(self) -> bool:
        """Whether any weight asks for a gradient."""
        return any(
            parameter.requires_grad for parameter in (self.trunk or self.reader).parameters()
        )

    def text_prompt(self, text: str) -> Prompt:
        """The prompt that asks for the output of the last input of a text."""
        *pairs, asked = pairs_in_text(text, self.name)
        return self.reader.prompt(asked.input, self.condition, pairs)

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Prompt], prefix: Tensor | None, max_length: int
    ) -> list[list[int]]:
        """See `TextReader.write`; the grammar of grids is kept."""
        if self.trunk is not None and prefix is not None:
            return self._write_after(prompts, prefix, max_length)
        if not max_length:
            return [[] for _ in prompts]
        done = decode(self.reader, with_soft(prompts, prefix), max_output_tokens=max_length)
        return [[choice for choice in one.choices if choice != grammar.END] for one in done]

    def _write_after(
        self, prompts: Sequence[Prompt], prefix: Tensor, max_length: int
    ) -> list[list[int]]:
        """No store of the trunk knows soft prefixes, so all tokens are read for every new one."""
        assert self.trunk is not None
        state = grammar.start(len(prompts), self.device)
        new: list[list[int]] = [[] for _ in prompts]
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
        """See `TextReader.latents`."""
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
    count = 0 if prefix is None else prefix.shape[1]
    parts, lengths = [], []
    for prompt, own in zip(prompts, new, strict=True):
        ends = np.cumsum([0, *(choice == grammar.ROW_END for choice in own)])[:-1]
        begin = np.searchsorted(ends, ends)
        places = (OUTPUT_PART * SIDE + ends) * SIDE + np.arange(len(own)) - begin
        marks = pack_position(SEPARATOR_PART) + 1 + np.arange(count).clip(max=SIDE - 2)
        shown = [*prompt.tokens, *[PREFIX] * count, *(CHOICES[choice] for choice in own)]
        parts.append((shown, [*prompt.positions, *marks, *places]))
        lengths.append(len(shown))
    tokens, positions = (
        torch.from_numpy(np.concatenate(x).astype(np.int64)).to(trunk.device)
        for x in zip(*parts, strict=True)
    )
    rows = torch.tensor([prompt.condition for prompt in prompts], device=trunk.device)
    length = torch.tensor(lengths, device=trunk.device)
    added = trunk.condition(rows).repeat_interleave(length, 0)
    if prefix is not None:
        place = (tokens == PREFIX).nonzero()[:, 0]
        added = added.index_add(0, place, prefix.flatten(0, 1).to(added))
    offsets = torch.nn.functional.pad(length.cumsum(0), (1, 0)).int()
    read = torch.tensor([len(prompt.tokens) for prompt in prompts], device=trunk.device)
    seen = spans(offsets, max(lengths), trunk.dtype, read)
    hidden = trunk.hidden(trunk.embed(tokens, added), positions, seen)
    return hidden[offsets[1:].long() - 1].float()

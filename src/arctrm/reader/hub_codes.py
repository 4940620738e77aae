"""Between the tiny reader's layout of a task and the tokens of a hub model.

Tokens are codes: those of the tiny reader, and from `FIRST_MARK` on the tokens of the model's marks
around the grids. What is laid out for the tiny reader is laid out for a hub model by putting its
marks where START and SEPARATOR stand; the rest is one token for one code.

Legend: n tokens of a layout, m codes.
"""

from dataclasses import replace

import numpy as np

from arctrm.reader.hub import HubReader
from arctrm.reader.interface import Prompt
from arctrm.reader.tokens import END, FIRST_MARK, ROW_END, SEPARATOR, START, Marks


class HubCodes:
    """The codes of a hub model."""

    def __init__(self, reader: HubReader):
        spelling, spelt = reader.spelling, reader.grid_tokens
        marks = (spelling.start, spelling.input_mark, spelling.output_mark)
        ends = FIRST_MARK + np.cumsum([len(mark) for mark in marks])
        self.marks = Marks(
            *(tuple(range(end - len(mark), end)) for mark, end in zip(marks, ends, strict=True))
        )
        own = [0] * FIRST_MARK  # of codes without a token: padding, the soft prefix
        own[: len(spelt.colours)] = spelt.colours
        own[ROW_END], own[END] = spelt.row_end, spelt.end
        self.ids = np.array([*own, *(token for mark in marks for token in mark)])
        """int64: the model's token of each code."""

    def marked(self, tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and positions, int64 [m], of what is laid out for the tiny reader, int64 [n].

        All tokens of a mark stand at its position.
        """
        pieces = {START: self.marks.before_input, SEPARATOR: self.marks.before_output}
        lengths = np.ones(len(tokens), dtype=np.int64)
        for token, piece in pieces.items():
            lengths[tokens == token] = len(piece)
        codes, places = np.repeat(tokens, lengths), np.repeat(positions, lengths)
        for token, piece in pieces.items():
            codes[codes == token] = np.tile(piece, int((tokens == token).sum()))
        start = np.array(self.marks.start, dtype=np.int64)
        first = np.full(len(start), positions[0])
        return np.concatenate((start, codes)), np.concatenate((first, places))

    def prompt(self, layout: Prompt) -> Prompt:
        """The same prompt in the model's own tokens, which it counts."""
        codes, _ = self.marked(layout.tokens, layout.positions)
        count = len(codes)
        return replace(
            layout, tokens=self.ids[codes], positions=np.arange(count), output_start=count
        )

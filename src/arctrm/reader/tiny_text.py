"""The tiny reader behind `TextReasoningModule`: text as far as a vocabulary of 16 tokens goes.

A text is read line by line: "input" and "output" alone on a line (whatever stands around them) and
rows of digits become tokens, placed by part, row and column as in training; every other line says
nothing to this reader and is passed over. Grid prompts and plain-language prompts written by
`reader.prompts` therefore read as exactly the tokens of their pairs.

Legend: B texts, S tokens, P prefix vectors, N new tokens, D width.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from arctrm.data.task import MAX_SIDE
from arctrm.errors import ConfigError
from arctrm.reader import tokens as t
from arctrm.reader.interface import Prompt
from arctrm.reader.tiny import TinyReader

LABEL = re.compile(r"\W*(input|output)\W*", re.IGNORECASE)
ROW = re.compile(r"\s*[0-9](?:\s*[0-9])*\s*")
WRITTEN = {
    **{colour: str(colour) for colour in range(t.NUM_COLOURS)},
    t.ROW_END: "\n",
    t.START: "input\n",
    t.SEPARATOR: "output\n",
}
"""Token -> its text; the others have none."""
UNBOUNDED = 2**31
PART = t.SIDE**2
"""Position numbers of one part."""


class TinyText:
    """A tiny reader that follows `TextReader`; `condition` as in `Prompt`."""

    def __init__(
        self,
        reader: TinyReader,
        condition: tuple[int, int, int] = (0, 0, 1),
        name: str = "tiny reader",
    ):
        self.model, self.condition, self.name = reader, condition, name
        self.max_tokens = UNBOUNDED  # positions are rows and columns: nothing runs out
        self.stop_tokens = (t.END, t.PAD, t.PREFIX)

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return self.model.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def new_cache(self, length: int) -> StaticCache:
        """An empty cache for `length` tokens, padding included."""
        return self.model.new_cache(length)

    def text_prompt(self, text: str) -> Prompt:
        """The tokens of a text; what is written goes on where the text stops.

        Raises:
            ConfigError: there is no row and no label in it, or a grid of more than 30 a side, or it
                ends within an input that the model has to see whole.
        """
        whole = self.model.config.sees_inputs_whole
        return written_prompt(text, self.name, self.condition, whole_inputs=whole)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of new tokens."""
        return text_of(tokens)

    def positions_after(self, start_B: Tensor, tokens_BN: Tensor, num_prefix: int) -> Tensor:
        """Positions int64 [B, P + N]: the prefix stands with the mark before the output, new tokens
        by row and column.
        """
        device, count = start_B.device, tokens_BN.shape[1]
        mark = (start_B // PART - 1).clamp(min=0) * PART
        prefix = torch.arange(1, num_prefix + 1, device=device).clamp(max=t.SIDE - 1)
        ends = torch.nn.functional.pad(tokens_BN == t.ROW_END, (1, 0))[:, :count]
        place = torch.arange(count, device=device)
        row_start = torch.where(ends, place, 0).cummax(1).values
        first_row = ends.cumsum(1) == 0
        y = start_B[:, None] // t.SIDE % t.SIDE + ends.cumsum(1)
        x = place - row_start + torch.where(first_row, start_B[:, None] % t.SIDE, 0)
        part = start_B[:, None] // PART * t.SIDE
        new = (part + y.clamp(max=t.SIDE - 1)) * t.SIDE + x.clamp(max=t.SIDE - 1)
        return torch.cat([mark[:, None] + prefix, new], 1)

    def embed(self, tokens_BS: Tensor, condition_B3: Tensor) -> Tensor:
        """Embeddings [B, S, D], the condition added to every token."""
        condition = self.model.condition(*condition_B3.unbind(1))[:, None]
        return self.model.llama.model.embed_tokens(tokens_BS) + condition

    def run(
        self,
        inputs: Tensor,
        positions_BS: Tensor,
        attention_mask: Tensor,
        cache: StaticCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, float32 [B, S, D], of embeddings [B, S, D]."""
        return self.model.read(inputs, positions_BS, attention_mask, cache).float()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [..., vocabulary]."""
        return self.model.head(hidden)

    def train(self, mode: bool = True) -> None:
        """Training mode."""
        self.model.train(mode)


def text_of(tokens: Sequence[int]) -> str:
    """The text of tokens."""
    return "".join(WRITTEN.get(token, "") for token in tokens)


def written_prompt(
    text: str, name: str, condition: tuple[int, int, int], whole_inputs: bool = False
) -> Prompt:
    """The tokens of a text for the reader `name`; what is written goes on where the text stops.

    Raises:
        ConfigError: there is no row and no label in it, or a grid of more than 30 a side, or it
            ends within an input with `whole_inputs`.
    """
    written = _Written(name)
    for line in text.splitlines():
        label = LABEL.fullmatch(line)
        if label is not None:
            written.begin_input() if label[1].lower() == "input" else written.begin_output()
        elif ROW.fullmatch(line):
            written.add_row([int(c) for c in line if c.isdigit()])
    if not written.tokens:
        raise ConfigError(
            f"{name}: reads rows of digits after the words input and output only, and "
            "there are none in the text; give such a text or use a reader from the hub"
        )
    if whole_inputs and written.part == t.INPUT_PART:
        raise ConfigError(
            f"{name}: the text ends within an input, which this reader has to see whole; end it "
            "with a line that says output"
        )
    tokens, positions = (np.array(x, np.int64) for x in (written.tokens, written.positions))
    return Prompt(tokens, positions, written.place(written.row), condition)


class _Written:
    """Tokens and positions of a text so far."""

    def __init__(self, name: str):
        self.name = name
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.pair, self.part, self.row = -1, t.START_PART, 0

    def place(self, y: int = 0, x: int = 0) -> int:
        """Position number in the current part."""
        return t.pack_position(max(self.pair, 0) * t.PARTS_PER_PAIR + self.part, y, x)

    def begin_input(self) -> None:
        """The next pair; an output before it is complete now."""
        if self.part == t.OUTPUT_PART and self.row:
            self._add(t.END, self.row)
        self.pair += 1
        self._begin(t.START_PART, t.START, t.INPUT_PART)

    def begin_output(self) -> None:
        """The output of the same pair."""
        if self.pair < 0:
            self.begin_input()
        self._begin(t.SEPARATOR_PART, t.SEPARATOR, t.OUTPUT_PART)

    def add_row(self, cells: list[int]) -> None:
        """A row of the current grid."""
        if self.pair < 0:
            self.begin_input()
        if len(cells) > MAX_SIDE or self.row >= MAX_SIDE:
            raise ConfigError(
                f"{self.name}: a grid in the text has more than {MAX_SIDE} rows or columns, "
                f"allowed is {MAX_SIDE}x{MAX_SIDE}; shorten it"
            )
        for x, token in enumerate((*cells, t.ROW_END)):
            self._add(token, self.row, x)
        self.row += 1

    def _begin(self, mark_part: int, mark: int, part: int) -> None:
        self.part = mark_part
        self._add(mark)
        self.part, self.row = part, 0

    def _add(self, token: int, y: int = 0, x: int = 0) -> None:
        self.tokens.append(token)
        self.positions.append(self.place(y, x))

"""A hub model and TRM joined by adapters; what `joint`, `eval` and `solve` share.

The trunk is TRM alone here; the hub model reads and writes. Three paths, each a field of
`CouplingConfig`. *Context*: what the model has read becomes first latents of every answer cell (z_H
beside the embedded answer, z_L to the states) and one vector that is added to every token of the
row, the mean of the context slots: the trunk was never trained with extra tokens. *Aligned*: the
model's state of each token of the question and of a draft goes onto that very token of TRM. *Back*:
TRM's answer and states become a soft prefix, behind which the model writes.

TRM takes its first z without a gradient to all but the first step; so all that is said to it is
also added to its embeddings, at every step, and carries the gradient.

Legend: N states of the hub model, H its width; T packed tokens of TRM, R rows (questions), D width
of TRM, S states or cells of a row, C context slots, P prefix vectors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arctrm.config import CouplingConfig
from arctrm.data.task import NUM_COLOURS, Grid, Pair
from arctrm.model.adapters import AlignedAdapter, LatentToTextAdapter, TextToLatentAdapter
from arctrm.model.layout import CHOICES, PREFIX, SIDE, VOCABULARY, output_tokens
from arctrm.model.trm import (
    Asked,
    Prediction,
    Refined,
    Rows,
    batches,
    first_state,
    lay_out,
    read_off,
    supervision_steps,
    usual_tokens,
)
from arctrm.model.trunk import Trunk

if TYPE_CHECKING:  # the reader's rooms are built on this one
    from arctrm.reader.hub import HubReader


class Heard(NamedTuple):
    """What the hub model has read for packed rows of TRM; never an answer."""

    hidden: Tensor
    """[N, H]: its states."""
    state: Tensor
    """int64 [T]: the state of each of TRM's tokens, -1 where the model has not read it."""
    begin: Tensor
    """int64 [R]: first state that a row may see; its sequence from there is its context."""
    visible: Tensor
    """int64 [R]: how many it may see."""


@dataclass(frozen=True, eq=False)
class AskedInContext(Asked):
    """A question with what the hub model is shown before it."""

    pairs: tuple[Pair, ...] = ()
    """Demonstrations as the view shows them."""


class Hybrid(nn.Module):
    """Hub model + adapters + trunk."""

    def __init__(self, reader: "HubReader", trunk: Trunk, config: CouplingConfig):
        super().__init__()
        self.reader, self.trunk, self.config = reader, trunk, config
        self.adapters = nn.ModuleDict()
        heads = {"num_heads": config.adapter_heads}
        if config.context:
            slots = config.num_context_slots
            self.adapters["context"] = TextToLatentAdapter(
                reader.width, trunk.width, num_context_slots=slots, **heads
            )
        if config.aligned:
            self.adapters["aligned"] = AlignedAdapter(reader.width, trunk.width)
        if config.back:
            scale = reader.embedding_scale()
            self.adapters["back"] = LatentToTextAdapter(
                trunk.width, reader.width, config.num_back_vectors, **heads, output_scale=scale
            )
        self.adapters.to(trunk.device)

    @property
    def closes_the_loop(self) -> bool:
        """Whether TRM's latents reach a next attempt of TRM: back to the reader, and from there."""
        return self.config.back and (self.config.context or self.config.aligned)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by part: reader, trunk, context, aligned, back."""
        modules = {"reader": self.reader, "trunk": self.trunk, **self.adapters}
        return {name: [p for p in m.parameters() if p.requires_grad] for name, m in modules.items()}

    def listen(self, asked: Sequence[Asked], num_tokens: int) -> Heard:
        """Let the hub model read questions, and their drafts where there are any.

        `num_tokens` T are those of the rows that `trm.lay_out` makes of the questions.
        """
        reader, tokens, state, begins = self.reader, [], [], [0]
        for one in asked:
            layout = self._layout(one)
            draft = output_tokens(one.shape, one.draft)[0] if one.draft is not None else layout[:0]
            tokens.append(np.append(layout, draft).astype(np.int64))
            own = len(one.prompt.tokens)
            length = own + len(output_tokens(one.shape, None)[0])
            there = np.arange(length) < own + len(draft)
            first = begins[-1] + len(layout) - own
            state.append(np.where(there, first + np.arange(length), -1))
            begins.append(begins[-1] + len(tokens[-1]))
        offsets = torch.tensor(begins, device=reader.device)
        packed = torch.from_numpy(np.concatenate(tokens)).to(reader.device)
        hidden = reader.run_packed(packed, offsets).to(self.trunk.device)
        offsets = offsets.to(hidden.device)
        states = torch.from_numpy(np.concatenate(state)).to(hidden.device)
        assert len(states) == num_tokens, (len(states), num_tokens)
        return Heard(hidden, states, offsets[:-1], offsets.diff())

    def said(self, heard: Heard, rows: Rows) -> tuple[Tensor, Tensor]:
        """What the adapters give to the rows: [T, D] to add to their embeddings, and the first z.

        Additions are measured by the trunk's embeddings, which training makes larger.
        """
        row, positions = rows.row.clamp(max=len(heard.begin) - 1), rows.positions
        added = z = heard.hidden.new_zeros(len(row), self.trunk.width)
        if "context" in self.adapters:
            adapter = cast(TextToLatentAdapter, self.adapters["context"])
            read = adapter.read_keys(*_visible(heard, adapter.keys(heard.hidden)))
            y, x = positions // SIDE % SIDE, positions % SIDE
            latents = adapter.cells(read, row, y.clamp(max=SIDE - 3), x.clamp(max=SIDE - 3))
            z_H, z_L = (latent * rows.cells[:, None] for latent in latents)
            added, z = added + adapter.slots(read).mean(1)[row] + z_H + z_L, z + z_L
        if "aligned" in self.adapters:
            there = heard.state >= 0
            own, injection = self.adapters["aligned"](heard.hidden[heard.state.clamp(min=0)], there)
            added, z = added + injection, z + own
        return added * self.trunk.embed_tokens.detach().square().mean().sqrt(), z

    def steps(self, rows: Rows, heard: Heard | None, num_steps: int) -> Iterator[Prediction]:
        """Predictions of supervision steps; without what was `heard` TRM is alone."""
        state = first_state(self.trunk, rows)
        if heard is None:
            return supervision_steps(self.trunk, rows, state, num_steps)
        added, z = self.said(heard, rows)
        state = state._replace(z=z.to(self.trunk.dtype))  # with its gradient
        return supervision_steps(self.trunk, rows, state, num_steps, added)

    def soft_prefix(self, rows: Rows, prediction: Prediction) -> Tensor:
        """[R, P, H]: what TRM tells the reader after a step: z_H is its answer, embedded (with
        a gradient), z_L its states. Raises KeyError without the path back.
        """
        num_rows = rows.condition.shape[0]
        believed = F.pad(prediction.logits.softmax(-1), (0, VOCABULARY - NUM_COLOURS))
        z_H, z_L = believed @ self.trunk.embed_tokens.float(), prediction.state.z.float()
        row = rows.row[rows.cells]
        count = torch.zeros(num_rows, dtype=torch.long, device=row.device)
        count = count.index_add(0, row, torch.ones_like(row))
        place = torch.arange(int(count.max()), device=row.device)
        mask = place < count[:, None]
        index = torch.where(mask, (count.cumsum(0) - count)[:, None] + place, 0)
        padded = (z[rows.cells][index] for z in (z_H, z_L))
        return self.adapters["back"](*padded, mask).to(self.reader.device)

    def written_loss(self, asked: Sequence[Asked], answers: Sequence[Grid], soft: Tensor) -> Tensor:
        """Mean cross entropy (nats a token, [R]) of answers that the reader writes behind the soft
        prefixes [R, P, H], as it does in answering (`reader.hub.with_soft`).
        """
        tokens, labels, begins, count = [], [], [0], soft.shape[1]
        choice_of = np.full(VOCABULARY, -100)
        choice_of[list(CHOICES)] = np.arange(len(CHOICES))
        for one, answer in zip(asked, answers, strict=True):
            layout = self._layout(one)
            own = output_tokens(answer.shape, answer)[0]
            tokens.append(np.concatenate((layout, np.full(count, PREFIX), own)))
            silent = np.full(len(layout) + count - 1, -100)
            labels.append(np.concatenate((silent, choice_of[own], [-100])))
            begins.append(begins[-1] + len(tokens[-1]))
        device = self.reader.device
        packed, label = (torch.from_numpy(np.concatenate(x)).to(device) for x in (tokens, labels))
        soft_TH = soft.new_zeros(len(packed), soft.shape[-1])
        soft_TH = soft_TH.index_put((packed == PREFIX,), soft.flatten(0, 1))
        hidden = self.reader.run_packed(packed, torch.tensor(begins), soft_TH)
        known = label >= 0
        loss = F.cross_entropy(
            self.reader.grid_logits(hidden[known]), label[known], reduction="none"
        )
        row = torch.bucketize(
            known.nonzero()[:, 0], torch.tensor(begins[1:], device=device), right=True
        )
        total, number = soft.new_zeros(2, len(asked)).unbind()
        return total.index_add(0, row, loss) / number.index_add(0, row, torch.ones_like(loss))

    def _layout(self, one: Asked) -> np.ndarray:
        """Tokens up to the output, demonstrations included."""
        pairs = one.pairs if isinstance(one, AskedInContext) else ()
        layout = self.reader.prompt(one.query, one.prompt.condition, pairs).layout
        assert layout is not None
        return layout


class HybridRefiner:
    """Answers as TRM that hears the hub model; where not `coupled`, as TRM alone.

    Questions are `AskedInContext` where the model is to see demonstrations.
    """

    def __init__(self, hybrid: Hybrid, halt_max_steps: int, *, coupled: bool = True):
        self.hybrid, self.halt_max_steps, self.coupled = hybrid, halt_max_steps, coupled

    @torch.no_grad()
    def refine(
        self,
        asked: Sequence[Asked],
        num_steps: int | None = None,
        *,
        tokens_per_batch: int | None = None,
        keep_history: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Refined]:
        """See `trm.Refiner.refine`."""
        hybrid = self.hybrid
        found: dict[int, Refined] = {}
        device = hybrid.trunk.device
        for batch in batches(asked, tokens_per_batch or usual_tokens(device)):
            chosen = [asked[index] for index in batch]
            rows, _ = lay_out(chosen, device, hybrid.trunk.dtype)
            heard = hybrid.listen(chosen, len(rows.tokens)) if self.coupled else None
            steps = hybrid.steps(rows, heard, num_steps or self.halt_max_steps)
            halts = num_steps is None
            answers = read_off(rows, steps, chosen, halts=halts, history=keep_history)
            found |= zip(batch, answers, strict=True)
            advance(len(batch))
        return [found[index] for index in range(len(asked))]


def _visible(heard: Heard, keys_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [R, S, D] of the states that each row may see, and the mask [R, S] of what is there."""
    place = torch.arange(int(heard.visible.max()), device=heard.hidden.device)
    mask = place < heard.visible[:, None]
    return keys_ND[torch.where(mask, heard.begin[:, None] + place, 0)], mask

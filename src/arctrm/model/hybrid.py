"""A hub model and TRM joined by adapters, over three paths; the trunk is TRM alone here.

*Context*: all that the model has read becomes first latents of every answer cell and one vector for
all tokens of the row. *Aligned*: the model's state of each token of the question and of a draft
goes onto that very token of TRM. *Back*: TRM's latents become a soft prefix, behind which the model
writes. All that is said to TRM is also added to its embeddings at every step, which carries the
gradient. Legend: N states of the hub model, H its width; T packed tokens of TRM, R rows, D width.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arctrm.config import CouplingConfig
from arctrm.data.task import NUM_COLOURS, Grid
from arctrm.model import trm
from arctrm.model.adapters import AlignedAdapter, LatentToTextAdapter, TextToLatentAdapter
from arctrm.model.layout import CHOICE_OF, PREFIX, SIDE, VOCABULARY, output_tokens
from arctrm.model.trm import Asked, Prediction, Rows, TrunkRefiner
from arctrm.model.trunk import Trunk

if TYPE_CHECKING:  # the reader's rooms are built on this one
    from arctrm.reader.hub import HubReader


class Heard(NamedTuple):
    """What the hub model has read for packed rows of TRM; never an answer."""

    hidden: Tensor  # [N, H]: its states
    state: Tensor  # int64 [T]: the state of each of TRM's tokens, -1 where it was not read
    begin: Tensor  # int64 [R]: first state that a row may see; its context begins there
    visible: Tensor  # int64 [R]: how many it may see


class HybridModel(nn.Module):
    """Hub model + adapters + trunk."""

    def __init__(self, reader: "HubReader", trunk: Trunk, config: CouplingConfig):
        super().__init__()
        self.reader, self.trunk, self.config = reader, trunk, config
        self.adapters = nn.ModuleDict()
        heads = config.adapter_heads
        scale = float(reader.embed(reader.choices).detach().float().square().mean().sqrt())
        if config.context:
            self.adapters["context"] = TextToLatentAdapter(
                reader.width, trunk.width, 900, config.num_context_slots, heads
            )
        if config.aligned:
            self.adapters["aligned"] = AlignedAdapter(reader.width, trunk.width)
        if config.back:
            self.adapters["back"] = LatentToTextAdapter(
                trunk.width, reader.width, config.num_back_vectors, heads, scale
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
        """Let the hub model read questions and their drafts, for rows of `num_tokens` T tokens."""
        tokens, state, begins = [], [], [0]
        for one in asked:
            layout = self._layout(one)
            draft = output_tokens(one.shape, one.draft)[0] if one.draft is not None else layout[:0]
            tokens.append(np.append(layout, draft).astype(np.int64))
            own = len(one.prompt.tokens)
            length = own + len(output_tokens(one.shape, None)[0])
            place = np.arange(length)
            first = begins[-1] + len(layout) - own
            state.append(np.where(place < own + len(draft), first + place, -1))
            begins.append(begins[-1] + len(tokens[-1]))
        offsets = torch.tensor(begins)
        packed = torch.from_numpy(np.concatenate(tokens)).to(self.reader.device)
        hidden = self.reader.run_packed(packed, offsets).to(self.trunk.device)
        offsets, states = (
            x.to(hidden.device) for x in (offsets, torch.from_numpy(np.concatenate(state)))
        )
        assert len(states) == num_tokens, (len(states), num_tokens)
        return Heard(hidden, states, offsets[:-1], offsets.diff())

    def said(self, heard: Heard, rows: Rows) -> tuple[Tensor, Tensor]:
        """What the adapters give to the rows: [T, D] to add to their embeddings (in units of the
        trunk's, which training makes larger), and the first z.
        """
        row, positions = rows.row.clamp(max=len(heard.begin) - 1), rows.positions
        added = z = heard.hidden.new_zeros(len(row), self.trunk.width)
        if "context" in self.adapters:
            adapter = cast(TextToLatentAdapter, self.adapters["context"])
            place = torch.arange(int(heard.visible.max()), device=heard.hidden.device)
            mask = place < heard.visible[:, None]  # (R, S): states that each row may see
            index = torch.where(mask, heard.begin[:, None] + place, 0)
            read = adapter.read_keys(adapter.keys(heard.hidden)[index], mask)
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
        state = trm.first_state(self.trunk, rows)
        if heard is None:
            return trm.supervision_steps(self.trunk, rows, state, num_steps)
        added, z = self.said(heard, rows)
        state = state._replace(z=z.to(self.trunk.dtype))  # with its gradient
        return trm.supervision_steps(self.trunk, rows, state, num_steps, added)

    def soft_prefix(self, rows: Rows, prediction: Prediction) -> Tensor:
        """[R, P, H]: what TRM tells the reader after a step. z_H is the answer, embedded (with a
        gradient), z_L the states.
        """
        believed = F.pad(prediction.logits.softmax(-1), (0, VOCABULARY - NUM_COLOURS))
        z_H, z_L = believed @ self.trunk.embed_tokens.float(), prediction.state.z.float()
        row = rows.row[rows.cells]
        count = torch.bincount(row, minlength=len(rows.condition))
        place = torch.arange(int(count.max()), device=row.device)
        mask = place < count[:, None]
        index = torch.where(mask, (count.cumsum(0) - count)[:, None] + place, 0)
        padded = (z[rows.cells][index] for z in (z_H, z_L))
        return self.adapters["back"](*padded, mask).to(self.reader.device)

    def written_loss(self, asked: Sequence[Asked], answers: Sequence[Grid], soft: Tensor) -> Tensor:
        """Mean cross entropy [R] (nats a token) of answers behind the soft prefixes [R, P, H]."""
        tokens, labels, begins, count = [], [], [0], soft.shape[1]
        for one, answer in zip(asked, answers, strict=True):
            layout = self._layout(one)
            own = output_tokens(answer.shape, answer)[0]
            tokens.append(np.concatenate((layout, np.full(count, PREFIX), own)))
            silent = np.full(len(layout) + count - 1, -100)
            labels.append(np.concatenate((silent, CHOICE_OF[own], [-100])))
            begins.append(begins[-1] + len(tokens[-1]))
        device = self.reader.device
        packed, label = (torch.from_numpy(np.concatenate(x)).to(device) for x in (tokens, labels))
        soft_TH = soft.new_zeros(len(packed), soft.shape[-1])
        soft_TH = soft_TH.index_put((packed == PREFIX,), soft.flatten(0, 1))
        logits = self.reader.grid_logits(
            self.reader.run_packed(packed, torch.tensor(begins), soft_TH)
        )
        sizes = np.diff(begins).tolist()
        parts = zip(logits.split(sizes), label.split(sizes), strict=True)
        return torch.stack([F.cross_entropy(own, wanted) for own, wanted in parts])

    def _layout(self, one: Asked) -> np.ndarray:
        """Tokens up to the output, demonstrations included."""
        layout = self.reader.prompt(one.query, one.prompt.condition, one.pairs).layout
        assert layout is not None
        return layout


class HybridRefiner(TrunkRefiner):
    """Answers as TRM that hears the hub model; where not `coupled`, as TRM alone."""

    def __init__(self, hybrid: HybridModel, halt_max_steps: int, *, coupled: bool = True):
        super().__init__(hybrid.trunk, halt_max_steps)
        self.hybrid, self.coupled = hybrid, coupled

    def steps(self, asked: Sequence[Asked], num_steps: int) -> tuple[Iterator[Prediction], Rows]:
        """See `TrunkRefiner.steps`."""
        rows, _ = trm.lay_out(asked, self.trunk.device, self.trunk.dtype)
        heard = self.hybrid.listen(asked, len(rows.tokens)) if self.coupled else None
        return self.hybrid.steps(rows, heard, num_steps), rows

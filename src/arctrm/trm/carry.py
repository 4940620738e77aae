"""The reference layout as the reference implementation drives it: dense batches and ACT halting.

`ReferenceTRM` takes batches {inputs, labels, puzzle_identifiers} of 30x30 canvases and keeps a
`Carry` from call to call: a row that has halted is replaced by the next batch's row and starts
from fresh latents. Packed training does the same with rows of different lengths
(`arctrm.training.stream`); the blocks and the recursion are the very same `TRM`.

Legend: B rows, S = slots + 900 tokens of a row, D width, V cell codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arctrm.trm.layers import Sequences, rotary_tables
from arctrm.trm.model import TRM, Latents

NUM_CELLS = 900


@dataclass
class Carry:
    """TRM's recurrent state between supervision steps."""

    latents: Latents
    """z_H and z_L, [B x S, D]."""
    steps: Tensor
    """int32 [B]: supervision steps taken on the current data."""
    halted: Tensor
    """bool [B]: the row is done and will be replaced."""
    current_data: dict[str, Tensor]
    """The batch rows being worked on."""


def halting(q_halt: Tensor, steps: Tensor, max_steps: int, exploration_prob: float) -> Tensor:
    """Which rows stop after this step in training (ACT without a continue loss; TRM section 2.3).

    A row stops when q_halt > 0 or after `max_steps`; with `exploration_prob` it must run a random
    number of steps (2..max) first. `steps` counts the step just taken.
    """
    explore = torch.rand_like(q_halt) < exploration_prob
    drawn = 2 + (torch.rand_like(q_halt) * (max_steps - 1)).floor()
    minimum = torch.where(explore, drawn.clamp(max=max_steps), 0)
    early = (q_halt > 0) & (steps >= minimum) if max_steps > 1 else torch.zeros_like(explore)
    return (steps >= max_steps) | early


class ReferenceTRM(nn.Module):
    """TRM on dense 30x30 batches with ACT halting, as the reference implementation's wrapper."""

    def __init__(self, trm: TRM):
        super().__init__()
        self.trm = trm

    def initial_carry(self, batch: dict[str, Tensor]) -> Carry:
        """All rows halted, so that the first call fills them from its batch."""
        rows, device = batch["inputs"].shape[0], batch["inputs"].device
        tokens = rows * (NUM_CELLS + self.trm.config.num_slots)
        return Carry(
            self.trm.initial_latents(tokens),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.bool, device=device),
            {name: torch.zeros_like(value) for name, value in batch.items()},
        )

    def forward(self, carry: Carry, batch: dict[str, Tensor]) -> tuple[Carry, dict[str, Tensor]]:
        """One supervision step; outputs are logits [B, 900, V] and q_halt_logits [B]."""
        fresh = carry.halted
        data = {
            name: torch.where(_rows_first(fresh, value), value, carry.current_data[name])
            for name, value in batch.items()
        }
        steps = torch.where(fresh, 0, carry.steps) + 1
        latents, prediction = self._step(self._reset(fresh, carry.latents), data)
        rows, slots = fresh.shape[0], self.trm.config.num_slots
        logits = prediction.logits.unflatten(0, (rows, -1))[:, slots:]
        halted = self._halted(prediction.q_halt, steps)
        outputs = {"logits": logits, "q_halt_logits": prediction.q_halt}
        return Carry(latents, steps, halted, data), outputs

    def _halted(self, q_halt: Tensor, steps: Tensor) -> Tensor:
        limit = self.trm.config.halt_max_steps
        if not self.training:  # evaluation always runs all steps
            return steps >= limit
        return halting(q_halt.detach(), steps, limit, self.trm.config.halt_exploration_prob)

    def _reset(self, fresh: Tensor, latents: Latents) -> Latents:
        start = self.trm.initial_latents(latents.z_H.shape[0])
        chosen = fresh.repeat_interleave(latents.z_H.shape[0] // fresh.shape[0])[:, None]
        return Latents(*(torch.where(chosen, a, b) for a, b in zip(start, latents, strict=True)))

    def _step(self, latents: Latents, data: dict[str, Tensor]):
        rows, device = data["inputs"].shape[0], data["inputs"].device
        slots = self.trm.config.num_slots
        length = slots + NUM_CELLS
        place = torch.arange(length, device=device).repeat(rows)
        row = torch.arange(rows, device=device)
        codes = torch.nn.functional.pad(data["inputs"], (slots, 0)).flatten()
        blank = torch.zeros_like(data["puzzle_identifiers"])
        prefix, condition = self.trm.prefix(data["puzzle_identifiers"], blank, blank)
        x = self.trm.embed(codes, row.repeat_interleave(length), row * length, prefix, condition)
        head = self.trm.config.hidden_size // self.trm.config.num_heads
        cos, sin = rotary_tables(place[:, None], head, self.trm.config.rope_base)
        offsets = torch.arange(0, rows * length + 1, length, device=device, dtype=torch.int32)
        seq = Sequences(offsets, length, cos, sin, True, None)
        return self.trm.supervision_step(latents, x, seq, row * length)


def _rows_first(mask: Tensor, value: Tensor) -> Tensor:
    return mask.view(-1, *(1,) * (value.ndim - 1))

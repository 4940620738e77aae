"""TRM answering many queries, through the functions of eval, against plain padded batches.

    python benchmarks/trm_inference.py --bundled --max-queries 4096                # a GPU
    python benchmarks/trm_inference.py --bundled --max-queries 24 --plain 2 --steps 4   # a CPU
    python benchmarks/trm_inference.py --hidden 64 --heads 2 --max-queries 64 --plain 8 --steps 4

The queries are test inputs of ARC-AGI-1 evaluation under `--views` views. The plain way is that of
the reference implementation: every query on a canvas of 30x30 cells, all steps, dense batches,
torch's own attention; in the same arithmetic, and compiled where ours is. It answers `--plain` of
the queries. Both are the same mathematics, which is checked on canvases that are equally large.

Prints one table. The floor is the matrix products of the tokens of each way, for the steps that
its queries took, as a share of the matrix rate measured in the same run (on a CPU in float32);
attention is not counted.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from arctrm.config import EvalConfig, InferenceConfig, TRMConfig
from arctrm.console import console
from arctrm.data import canvas
from arctrm.data.task import MAX_SIDE
from arctrm.errors import ConfigError
from arctrm.solving.candidates import Query, answer, refined, task_queries
from arctrm.solving.evaluate import load
from arctrm.solving.weights import Solver, load_solver
from arctrm.training.devices import new_accelerator
from arctrm.training.estimate import block_parameters
from arctrm.training.provenance import git_revision, hardware
from arctrm.trm.layers import BlockWeights, apply_rotary, rms_norm, rotary_tables
from arctrm.trm.model import TRM, count_parameters
from common import (
    fresh_peak,
    guarded,
    matrix_rate,
    peak_memory,
    show_profile,
    spread,
    timed,
    untrained_trm,
    weights_arguments,
)


@dataclass(frozen=True)
class Way:
    """How queries were answered."""

    name: str
    queries: int
    seconds: float
    steps: float
    """Mean over the queries."""
    operations: float
    """Of the matrix products that had to be done."""
    peak: str


def main() -> None:
    args = arguments()
    device = new_accelerator().device
    solver = chosen_solver(args, device)
    asked = partial(task_queries, solver, seed=0)
    queries = spread(load(EvalConfig())[0], args.views, args.max_queries, asked)
    few = [queries[int(i)] for i in np.linspace(0, len(queries) - 1, min(args.plain, len(queries)))]
    settings = InferenceConfig(steps=args.steps, tokens_per_batch=args.tokens)
    halting = settings.model_copy(update={"halt": True})
    answer(solver, few[:2], settings.model_copy(update={"steps": 1}))  # compiles
    ways = [ours("packed, all steps", solver, queries, settings, args.rounds)]
    if args.bundled or args.checkpoint:
        ways.append(ours("packed, halting", solver, queries, halting, args.rounds))
    plain = Plain(solver.trm, args.steps, args.plain_batch)
    plain.answer(few[: args.plain_batch], steps=1)  # compiles
    ways.append(plainly(plain, few, args.rounds))
    show(args, solver, ways, agreement(solver, plain, few[:4], settings), device)
    if args.profile:
        show_profile(lambda: answer(solver, queries, settings), rows=25)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    weights_arguments(parser)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--H-cycles", type=int, default=3)
    parser.add_argument("--L-cycles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--max-queries", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=None, help="of a packed batch; default: eval")
    parser.add_argument("--plain", type=int, default=256, help="queries of the plain way")
    parser.add_argument("--plain-batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def chosen_solver(args: argparse.Namespace, device: torch.device) -> Solver:
    if args.bundled or args.checkpoint:
        solver = load_solver(args.checkpoint, InferenceConfig(), device)
        if not solver.has_trm:
            raise ConfigError(f"{solver.name}: holds no TRM; give a checkpoint with one")
        return solver
    sizes = {"hidden_size": args.hidden, "num_heads": args.heads, "num_layers": args.layers}
    cycles = {"H_cycles": args.H_cycles, "L_cycles": args.L_cycles}
    trm = untrained_trm(TRMConfig(**sizes, **cycles), device)
    return Solver(trm, {}, by_content=True, views={}, name="random weights")


def ours(
    name: str, solver: Solver, queries: list[Query], settings: InferenceConfig, rounds: int
) -> Way:
    fresh_peak()
    run = timed(lambda: answer(solver, queries, settings), rounds)
    steps = [candidate.steps or 0 for _, candidate in run.result]
    slots = solver.trm.config.num_slots
    tokens = sum((slots + q.codes.size) * n for q, n in zip(queries, steps, strict=True))
    work = step_operations(solver.trm.config) * tokens
    return Way(name, len(queries), run.seconds, statistics.mean(steps), work, peak_memory())


def plainly(plain: "Plain", queries: list[Query], rounds: int) -> Way:
    fresh_peak()
    seconds = timed(lambda: plain.answer(queries, plain.steps), rounds).seconds
    tokens = plain.row * len(queries) * plain.steps
    work = step_operations(plain.trm.config) * tokens
    name = f"plain, {plain.row} tokens a query"
    return Way(name, len(queries), seconds, plain.steps, work, peak_memory())


def step_operations(config: TRMConfig) -> float:
    """Of the matrix products of one supervision step on one token."""
    return 2 * block_parameters(config) * config.H_cycles * (config.L_cycles + 1)


class Plain:
    """The same model on dense batches of 30x30 canvases, written out."""

    def __init__(self, trm: TRM, steps: int, batch_size: int):
        self.trm, self.steps, self.batch_size = trm, steps, batch_size
        self.row = trm.config.num_slots + MAX_SIDE**2
        self.weights = trm.L_level.cast(trm.dtype)
        self.cos, self.sin = self._tables()
        self.level = torch.compile(self._level) if trm.H_init.is_cuda else self._level

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Rotary tables [S, 1, K] of a row: slots at place 0, then the cells."""
        config, device = self.trm.config, self.trm.H_init.device
        if config.layout == "reference":
            positions = torch.arange(self.row, device=device)[:, None]
        else:
            cell = (torch.arange(self.row, device=device) - config.num_slots).clamp(min=0)
            positions = torch.stack((cell // MAX_SIDE, cell % MAX_SIDE), dim=1)
        return rotary_tables(positions, config.hidden_size // config.num_heads, config.rope_base)

    @torch.no_grad()
    def answer(self, queries: Sequence[Query], steps: int) -> list[np.ndarray]:
        """Codes [30 x 30] of each query."""
        found: list[np.ndarray] = []
        for begin in range(0, len(queries), self.batch_size):
            batch = queries[begin : begin + self.batch_size]
            x = self._embedded(batch)
            z_H = self.trm.H_init.to(x.dtype).expand_as(x)
            z_L = self.trm.L_init.to(x.dtype).expand_as(x)
            for _ in range(steps):
                for _ in range(self.trm.config.H_cycles):
                    for _ in range(self.trm.config.L_cycles):
                        z_L = self.level(z_L + z_H + x)
                    z_H = self.level(z_H + z_L)
                logits = F.linear(z_H, self.trm.lm_head.weight.to(x.dtype)).float()
            codes = logits[:, self.trm.config.num_slots :].argmax(-1)
            found += list(codes.to(torch.uint8).cpu().numpy())
        return found

    def _embedded(self, batch: Sequence[Query]) -> Tensor:
        """Slots and cells [B, S, D] of the queries on full canvases."""
        trm, device = self.trm, self.trm.H_init.device
        cells = np.stack([full(query).codes.ravel() for query in batch])
        codes = torch.from_numpy(cells).long().to(device)
        columns = [(q.row, q.view.dihedral, int(q.view.identity_colours)) for q in batch]
        prefix, condition = trm.prefix(*torch.tensor(columns, device=device).unbind(1))
        embedded = F.embedding(codes, trm.embed_tokens.embedding_weight) + condition[:, None]
        return torch.cat((prefix, embedded), 1).to(trm.dtype) * trm.config.hidden_size**0.5

    def _level(self, z_BSD: Tensor) -> Tensor:
        for w in self.weights:
            z_BSD = self._block(z_BSD, w)
        return z_BSD

    def _block(self, x: Tensor, w: BlockWeights) -> Tensor:
        config = self.trm.config
        q, k, v = F.linear(x, w.qkv).unflatten(-1, (3, config.num_heads, -1)).unbind(2)
        if config.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        q, k = apply_rotary(q, self.cos, self.sin), apply_rotary(k, self.cos, self.sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = rms_norm(x + F.linear(mixed, w.out))
        gate, up = F.linear(x, w.gate_up).chunk(2, dim=-1)
        return rms_norm(x + F.linear(F.silu(gate) * up, w.down))


def full(query: Query) -> Query:
    """The same query on a canvas of 30x30 cells."""
    grid = canvas.decode(query.codes)
    assert grid is not None
    return dataclasses.replace(query, codes=canvas.encode(grid, MAX_SIDE, MAX_SIDE))


def agreement(
    solver: Solver, plain: Plain, queries: list[Query], settings: InferenceConfig
) -> float:
    """Share of cells that both say after the first step, on the same canvases."""
    first = settings.model_copy(update={"steps": 1})
    large = refined(solver, [full(query) for query in queries], first)
    said = plain.answer(queries, steps=1)
    return float(np.mean([a.codes == b for a, b in zip(large, said, strict=True)]))


def show(
    args: argparse.Namespace, solver: Solver, ways: list[Way], same: float, device: torch.device
) -> None:
    config, ceiling = solver.trm.config, matrix_rate(device)
    trunk = count_parameters(solver.trm)["trunk"]
    title = f"TRM inference, {git_revision()[:12]}, {hardware()}"
    columns = ("", "queries", "seconds", "queries/s", "ratio", "steps/query", "floor", "peak")
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    slowest = ways[-1].queries / ways[-1].seconds
    for way in ways:
        rate = way.queries / way.seconds
        table.add_row(
            way.name,
            f"{way.queries:,}",
            f"{way.seconds:.2f}",
            f"{rate:,.2f}",
            f"{rate / slowest:.2f}x",
            f"{way.steps:.2f}",
            f"{way.operations / way.seconds / ceiling:.0%} of {ceiling / 1e12:,.2f} TFLOP/s",
            way.peak,
        )
    table.caption = (
        f"{solver.name}: d{config.hidden_size} x {config.num_layers} layers, {trunk / 1e6:.1f}M, "
        f"H{config.H_cycles}/L{config.L_cycles}, {solver.trm.dtype}; median of {args.rounds}; "
        f"cells the same on full canvases after a step: {same:.1%}"
    )
    console().print(table)


if __name__ == "__main__":
    guarded(main)

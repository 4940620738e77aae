"""Greedy grid decoding and candidate scoring with the tiny reader, through the functions of eval.

    python benchmarks/grid_decoding.py                             # d768 x 10 layers, about 75M
    python benchmarks/grid_decoding.py --bundled --max-prompts 3352 --profile
    python benchmarks/grid_decoding.py --width 64 --layers 2 --max-prompts 16      # a CPU, seconds

The prompts are the 419 test inputs of ARC-AGI-1 evaluation under `--views` views. With `--forced`
(the default with random weights, which would go on until their bound) no grid ends by itself: the
row end of the first row and the end token are never the likeliest, and each prompt's output is
bounded to the tokens of its true test output as the view shows it. The work is then that of right
answers; the cache, too, has room for the longest true output only, not for all plausible ones.

Prints one table. The floors are those of the same machine, measured in the same run: the bytes of
the weights once per decoding step and of the live keys and values once per token, at the rate of a
copy; and 2 operations per parameter and token at the rate of a matrix product, attention not
counted. The plain loop is transformers' way: one prompt after another, with its growing cache.
mdlARC's decoder (75.5M) reaches 25 grids/s on one H200.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pydantic import ValidationError
from rich.table import Table
from torch import nn
from transformers import DynamicCache

from arctrm.config import EvalConfig, InferenceConfig, ReaderConfig
from arctrm.config.decoding import DecodingConfig
from arctrm.console import console
from arctrm.data.task import NUM_COLOURS, Grid, Task
from arctrm.errors import ConfigError
from arctrm.reader import grammar
from arctrm.reader.decoding import Decoded
from arctrm.reader.grammar import num_tokens
from arctrm.reader.interface import Prompt
from arctrm.reader.rows import by_length, distinct
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import END, ROW_END, VOCABULARY
from arctrm.solving.candidates import Key
from arctrm.solving.evaluate import load
from arctrm.solving.reading import (
    Reading,
    batch_size,
    judge,
    propose,
    task_readings,
    turned_back,
)
from arctrm.solving.weights import Solver, load_solver
from arctrm.training.devices import new_accelerator
from arctrm.training.provenance import git_revision, hardware
from arctrm.training.stages import compute_dtype
from arctrm.trm.model import count_parameters
from common import (
    fresh_peak,
    guarded,
    matrix_rate,
    memory_rate,
    peak_memory,
    reader_of,
    show_profile,
    spread,
    timed,
    weights_arguments,
)

REFERENCE_GRIDS_PER_SECOND = 25
"""mdlARC, measured on one H200."""
NEVER = -1e4
"""Added to a logit that must not be the greatest."""


def main() -> None:
    args = arguments()
    job = build(args)
    size = batch_size(job.reader, job.decoding)
    first = timed(lambda: job.decode(job.readings[:: -(-len(job.readings) // size)]))
    rows = {
        "model": f"d{job.reader.hidden_size} x {job.reader.config.num_layers} layers, "
        f"{job.parameters / 1e6:.1f}M parameters, {job.name}, {job.reader.dtype}",
        "prompts": f"{len(job.readings):,}, at most {size:,} side by side"
        f"{', forced to the length of the answer' if job.forced else ''}",
        "first batch, with start-up": f"{first.seconds:.1f} s",
    }
    machine = Machine(memory_rate(job.reader.device), matrix_rate(job.reader.device))
    rows |= decoding_figures(job, machine, args.rounds, args.plain)
    if args.candidates:
        rows |= scoring_figures(job, machine, args.rounds, args.candidates)
    title = f"grid decoding, {git_revision()[:12]}, {hardware()}"
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(table)
    if args.profile:
        few = middle(job.readings, 2 * size)
        show_profile(lambda: job.decode(few), rows=25)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    weights_arguments(parser)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=None, help="default: width / 64")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--views", type=positive, default=80)
    parser.add_argument("--max-prompts", type=positive, default=None)
    parser.add_argument("--batch-size", type=positive, default=None, help="default: as eval")
    parser.add_argument("--forced", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--candidates", type=natural, default=4, help="of each prompt; 0: no scoring"
    )
    parser.add_argument("--plain", type=natural, default=4, help="prompts of the plain loop")
    parser.add_argument("--rounds", type=positive, default=1)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def natural(text: str) -> int:
    return positive(text) if text != "0" else 0


@dataclass(frozen=True)
class Machine:
    """What the machine can do at most, as measured."""

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True, eq=False)
class Job:
    """Who reads what."""

    reader: TinyReader
    name: str
    readings: list[Reading]
    answers: dict[Key, Grid]
    decoding: DecodingConfig
    forced: bool

    def decode(self, readings: Sequence[Reading]) -> list[list[Decoded]]:
        """Propose greedily, as eval does."""
        return propose(self.reader, readings, self.decoding)

    @property
    def parameters(self) -> int:
        """Parameters that every token passes through."""
        return count_parameters(self.reader)["trunk"]

    @property
    def element_size(self) -> int:
        """Bytes of a weight, and of a key or value."""
        return self.reader.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        config = self.reader.config
        return 2 * config.depth * config.hidden_size * self.element_size


def build(args: argparse.Namespace) -> Job:
    tasks, known = load(EvalConfig())
    answers = {
        (task, index): grid
        for task, grids in known.items()
        for index, grid in enumerate(grids)
        if grid is not None
    }
    device = new_accelerator().device
    random = not (args.checkpoint or args.bundled)
    solver = random_solver(args, tasks, device) if random else trained_solver(args, device)
    assert solver.reader is not None
    asked = partial(task_readings, solver, seed=0)
    readings = spread(tasks, args.views, args.max_prompts, asked)
    forced = random if args.forced is None else args.forced
    if forced:
        never_end(solver.reader)
        readings = [bounded(reading, answers[reading.key]) for reading in readings]
    decoding = DecodingConfig(batch_size=args.batch_size)
    return Job(solver.reader, solver.name, readings, answers, decoding, forced)


def random_solver(args: argparse.Namespace, tasks: list[Task], device: torch.device) -> Solver:
    """A reader with random weights that knows all tasks, as it would be loaded."""
    heads = args.heads or max(1, args.width // 64)
    try:
        config = ReaderConfig(hidden_size=args.width, num_heads=heads, num_layers=args.layers)
    except ValidationError as error:
        raise ConfigError(f"--width, --heads, --layers: {error.errors()[0]['msg']}") from error
    torch.manual_seed(0)
    reader = TinyReader(config, len(tasks) + 1).to(device).eval().requires_grad_(False)
    dtype = compute_dtype("auto", device)
    reader.to(dtype).dtype = dtype
    rows = {task.id: row for row, task in enumerate(tasks)}
    return Solver(reader, rows, by_content=False, views={}, name="random weights")


def trained_solver(args: argparse.Namespace, device: torch.device) -> Solver:
    solver = load_solver(args.checkpoint, InferenceConfig(), device)
    reader_of(solver)  # refuses what holds none
    return solver


def never_end(reader: TinyReader) -> None:
    """Let no row of a grid end before it is full, and no grid before row 30."""
    weight = reader.llama.lm_head.weight
    bias = torch.zeros(VOCABULARY, dtype=weight.dtype, device=weight.device)
    bias[[ROW_END, END]] = NEVER
    reader.llama.lm_head.bias = nn.Parameter(bias, requires_grad=False)


def bounded(reading: Reading, answer: Grid) -> Reading:
    """The reading with room for its true output."""
    return dataclasses.replace(reading, max_output_tokens=num_tokens(reading.view.apply(answer)))


def middle(readings: list[Reading], count: int) -> list[Reading]:
    """Readings of about the median length, as they would stand side by side."""
    order = by_length([r.prompt for r in readings], [r.max_output_tokens for r in readings])
    begin = max(0, (len(order) - count) // 2)
    return [readings[index] for index in order[begin : begin + count]]


def decoding_figures(job: Job, machine: Machine, rounds: int, plain: int) -> dict[str, str]:
    fresh_peak()
    run = timed(lambda: job.decode(job.readings), rounds)
    peak = peak_memory()
    found = [own[0] for own in run.result]
    counts = [one.num_tokens for one in found]
    grids, tokens = len(found) / run.seconds, sum(counts) / run.seconds
    by_bytes, by_arithmetic = decoding_floors(job, counts, machine)
    floor = max(by_bytes, by_arithmetic)
    figures = {
        "grids/s, greedy": f"{grids:,.1f} ({run.seconds:.2f} s, median of {rounds})",
        f"against the reference's {REFERENCE_GRIDS_PER_SECOND}/s": f"{over_reference(grids):.2f}x",
        "output tokens/s": f"{tokens:,.0f} ({sum(counts):,} tokens)",
        "floor of the bytes": f"{by_bytes:.3f} s at {machine.bytes_per_second / 1e9:,.0f} GB/s",
        "floor of the arithmetic": f"{by_arithmetic:.3f} s at "
        f"{machine.operations_per_second / 1e12:,.2f} TFLOP/s",
        "time over the higher floor": f"{run.seconds / floor:.1f}x",
        "peak memory": peak,
    }
    if not job.forced:
        figures["right grids"] = f"{num_right(job, found):,} of {len(found):,}"
    return figures | (plain_figures(job, found, plain, grids) if plain else {})


def over_reference(grids_per_second: float) -> float:
    return grids_per_second / REFERENCE_GRIDS_PER_SECOND


def decoding_floors(job: Job, counts: list[int], machine: Machine) -> tuple[float, float]:
    """Seconds that the bytes and the arithmetic of decoding take at least.

    `counts` are the output tokens of each reading. Steps are as few as batches of this size can
    have: those whose outputs are of like length stand side by side.
    """
    size = batch_size(job.reader, job.decoding)
    steps = sum(sorted(counts, reverse=True)[::size])
    lengths = [len(reading.prompt.tokens) for reading in job.readings]
    # Output token number i is chosen after the prompt and i tokens have been read.
    read = sum(n * p + n * (n - 1) // 2 for n, p in zip(counts, lengths, strict=True))
    moved = steps * job.parameters * job.element_size + read * job.token_bytes
    return moved / machine.bytes_per_second, arithmetic(job, sum(counts), machine)


def arithmetic(job: Job, num_output_tokens: int, machine: Machine) -> float:
    """Seconds for the products of weights with the prompts, each read once, and the outputs."""
    prompts = distinct([reading.prompt for reading in job.readings])[0]
    tokens = sum(len(prompt.tokens) for prompt in prompts) + num_output_tokens
    return 2 * job.parameters * tokens / machine.operations_per_second


def num_right(job: Job, found: list[Decoded]) -> int:
    grids = [turned_back(r, one.grid) for r, one in zip(job.readings, found, strict=True)]
    return sum(
        grid is not None and np.array_equal(grid, job.answers[reading.key])
        for reading, grid in zip(job.readings, grids, strict=True)
    )


def plain_figures(job: Job, found: list[Decoded], count: int, grids: float) -> dict[str, str]:
    """The plain loop on a few prompts, against the rate of `grids` per second of the same run."""
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int).tolist()
    few = [job.readings[index] for index in chosen]
    plain_greedy(job.reader, few[0].prompt, max_output_tokens=8)  # start-up
    run = timed(lambda: [plain_greedy(job.reader, r.prompt, r.max_output_tokens) for r in few])
    same = sum(found[i].tokens == own for i, own in zip(chosen, run.result, strict=True))
    rate = sum(map(len, run.result)) / run.seconds
    ours = sum(one.num_tokens for one in found) / len(found) * grids
    return {
        "plain loop, batch of 1": f"{len(few) / run.seconds:.2f} grids/s, {rate:,.0f} tokens/s, "
        f"{same} of {len(few)} outputs the same",
        "tokens/s over the plain loop's": f"{ours / rate:.1f}x",
    }


@torch.no_grad()
def plain_greedy(reader: TinyReader, prompt: Prompt, max_output_tokens: int) -> tuple[int, ...]:
    """The output tokens of one prompt, through transformers' model and its growing cache."""
    device, cache = reader.device, DynamicCache()
    condition = reader.condition(*torch.tensor([prompt.condition], device=device).unbind(1))
    start = torch.tensor([prompt.output_start], device=device)
    ids = torch.tensor(grammar.choice_ids(reader.grid_tokens), device=device)
    tokens, positions = (
        torch.from_numpy(column).to(device)[None] for column in (prompt.tokens, prompt.positions)
    )
    state = grammar.start(1, device)
    output: list[int] = []
    while len(output) < max_output_tokens and not bool(state.finished):
        embedded = reader.llama.model.embed_tokens(tokens) + condition[:, None]
        out = reader.llama.model(
            inputs_embeds=embedded.to(reader.dtype),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = reader.head(out.last_hidden_state[:, -1])[:, ids]
        choice = grammar.log_probabilities(logits, state).argmax(dim=-1)
        tokens = ids[choice][None]
        positions = reader.output_positions(start, len(output), state.y, state.x)[None]
        state = grammar.advance(state, choice)
        output.append(int(tokens))
    return tuple(output)


def scoring_figures(job: Job, machine: Machine, rounds: int, count: int) -> dict[str, str]:
    grids = {key: candidates(answer, count) for key, answer in job.answers.items()}
    few = job.readings[:: -(-len(job.readings) // batch_size(job.reader, job.decoding))]
    judge(job.reader, few, grids, job.decoding)
    fresh_peak()
    run = timed(lambda: judge(job.reader, job.readings, grids, job.decoding), rounds)
    peak = peak_memory()
    tokens = count * sum(num_tokens(job.answers[reading.key]) for reading in job.readings)
    floor = arithmetic(job, tokens, machine)
    return {
        "candidates/s, scoring": f"{count * len(job.readings) / run.seconds:,.1f} ({count} of each "
        f"prompt, {run.seconds:.2f} s)",
        "scoring over the floor of its arithmetic": f"{run.seconds / floor:.1f}x",
        "peak memory of scoring": peak,
    }


def candidates(answer: Grid, count: int) -> list[Grid]:
    """The answer, and copies of it in which one cell in ten has another colour at random."""
    rng = np.random.default_rng(0)
    others = [
        np.where(
            rng.random(answer.shape) < 0.1, rng.integers(NUM_COLOURS, size=answer.shape), answer
        ).astype(np.uint8)
        for _ in range(count - 1)
    ]
    return [answer, *others]


if __name__ == "__main__":
    guarded(main)

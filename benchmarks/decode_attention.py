"""Attention of one new token in each row: the kernel of decoding against torch's packed kernel.

    python benchmarks/decode_attention.py                          # 4,096 rows, 12 heads of 64
    python benchmarks/decode_attention.py --rows 64                # the last rows of a batch

Rows fill `--shortest` to `--longest` places, uniformly at random, one row after another: without
the gaps that rows have while they are decoded, which suits the packed kernel. Both ways are timed
as decoding runs them, from a captured graph. Prints one table. The floor is that of the bytes:
every key and value read once, queries read and results written, at the rate of a copy on the same
machine; a copy writes as much as it reads, so a kernel that only reads may come out below 1. Needs
a GPU.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from arctrm.console import console
from arctrm.errors import UserError
from arctrm.reader.attention import ragged_attention
from arctrm.reader.last_attention import has_kernel, last_attention
from arctrm.training.provenance import git_revision, hardware
from common import guarded, memory_rate, timed, wait

REPEATS = 20
"""Calls in a captured graph."""


@dataclass(frozen=True, eq=False)
class Job:
    """What is attended to: R rows, P places, A heads, K head width."""

    query_RAK: Tensor
    keys_PAK: Tensor
    values_PAK: Tensor
    begin_R: Tensor
    filled_R: Tensor
    longest: int

    def by_kernel(self) -> Tensor:
        """As decoding does it."""
        return last_attention(
            self.query_RAK, self.keys_PAK, self.values_PAK, self.begin_R, self.filled_R
        )

    def packed(self) -> Callable[[], Tensor]:
        """The same by the packed kernel; where rows begin is prepared once, as a batch would."""
        num_rows, device = len(self.begin_R), self.begin_R.device
        begin_q = torch.arange(num_rows + 1, device=device, dtype=torch.int32)
        end = self.begin_R[-1:] + self.filled_R[-1:]
        begin_k = torch.cat((self.begin_R, end)).to(torch.int32)
        return lambda: ragged_attention(
            self.query_RAK, self.keys_PAK, self.values_PAK, begin_q, begin_k, 1, self.longest
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that have to be read or written."""
        read = (self.keys_PAK, self.values_PAK, self.query_RAK)
        return sum(x.nbytes for x in read) + self.query_RAK.nbytes


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        raise UserError("decode_attention: there is no CUDA device here; run it where there is one")
    if not has_kernel():
        raise UserError("decode_attention: Triton is not installed; install torch with CUDA")
    job = build(args)
    packed = job.packed()
    floor = job.num_bytes / memory_rate(job.begin_R.device)
    table = Table(title=f"attention of decoding, {git_revision()[:12]}, {hardware()}")
    for column in ("", "ms", "over the floor", "GB/s"):
        table.add_column(column)
    for name, seconds in {
        "kernel of decoding": seconds_of(job.by_kernel, args.rounds),
        "packed kernel": seconds_of(packed, args.rounds),
        "floor of the bytes": floor,
    }.items():
        rate = job.num_bytes / seconds / 1e9
        table.add_row(name, f"{seconds * 1e3:.3f}", f"{seconds / floor:.2f}x", f"{rate:,.0f}")
    apart = (job.by_kernel().float() - packed().float()).abs().max()
    table.caption = (
        f"{args.rows:,} rows of {args.shortest} to {args.longest} places, {len(job.keys_PAK):,} in "
        f"all, {args.heads} heads of {args.width}, bfloat16; median of {args.rounds} rounds of "
        f"{REPEATS} calls; results at most {apart:.1e} apart"
    )
    console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--shortest", type=int, default=100, help="places of a row, at least")
    parser.add_argument("--longest", type=int, default=800, help="places of a row, at most")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def build(args: argparse.Namespace) -> Job:
    torch.manual_seed(0)
    device = torch.device("cuda")
    filled = torch.randint(args.shortest, args.longest + 1, (args.rows,), device=device)
    shape = int(filled.sum()), args.heads, args.width
    query = torch.randn(args.rows, *shape[1:], device=device, dtype=torch.bfloat16)
    keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Job(query, keys, values, filled.cumsum(0) - filled, filled, args.longest)


def seconds_of(attend: Callable[[], Tensor], rounds: int) -> float:
    """Seconds of one call, from a graph of several."""
    device = attend().device  # compiles
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            attend()

    def work() -> list[Tensor]:
        graph.replay()
        wait(device)
        return []

    work()
    return timed(work, rounds).seconds / REPEATS


if __name__ == "__main__":
    guarded(main)

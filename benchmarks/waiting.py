"""Layers a second on the CPU, by how threads wait for each other, on a quiet and a busy machine.

    python benchmarks/waiting.py [--tokens 16] [--seconds 3] [--rounds 3] [--busy N]

One process for each row and round goes through layers of the shipped trunk's size. "busy": N other
processes compute meanwhile, by default one for each core. The rows take turns and the best round
counts, so that the work of others on the machine spoils rounds rather than rows.
"""

import argparse
import os
import subprocess
import sys
import time

from arctrm.cli import SPINS

WIDTH, INNER, LOOP = 640, 1728, "while True: pass"
ROWS = {
    "libgomp's default": {},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    f"spin {SPINS} rounds (arctrm)": {"GOMP_SPINCOUNT": str(SPINS)},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SETTINGS = {name for settings in ROWS.values() for name in settings}


def layers_per_second(tokens: int, seconds: float) -> float:
    """What one process gets done."""
    import torch

    sizes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER)]
    qkv, out, gate_up, down = (torch.randn(size) / size[1] ** 0.5 for size in sizes)
    x, done, begin = torch.randn(tokens, WIDTH), 0, 0.0
    with torch.inference_mode():
        for step in range(10**9):
            for _ in range(12):
                x = x + (x @ qkv.T)[:, :WIDTH] @ out.T
                gate, up = (torch.nn.functional.rms_norm(x, (WIDTH,)) @ gate_up.T).chunk(2, -1)
                x = x + (torch.nn.functional.silu(gate) * up) @ down.T
            x = torch.nn.functional.rms_norm(x, (WIDTH,))
            if step < 2:  # the first ones warm up
                begin = time.perf_counter()
            elif (elapsed := time.perf_counter() - begin) > seconds:
                break
            else:
                done += 12
    return done / elapsed


def main() -> None:
    """Run every row in turn and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=os.cpu_count())
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(layers_per_second(options.tokens, options.seconds))
        return
    child = [sys.executable, __file__, "--child", *sys.argv[1:]]
    environ = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    best = {(name, others): 0.0 for name in ROWS for others in (0, options.busy)}
    for _ in range(options.rounds):
        for name, others in best:
            busy = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(others)]
            told = subprocess.check_output(child, env=environ | ROWS[name], text=True)
            for process in busy:
                process.kill()
                process.wait()
            best[name, others] = max(best[name, others], float(told))
    print(f"layers/s of {options.tokens} tokens: quiet, beside {options.busy} busy processes")
    for name in ROWS:
        print(f"{name:<28}{best[name, 0]:8.0f}{best[name, options.busy]:8.0f}")


if __name__ == "__main__":
    main()

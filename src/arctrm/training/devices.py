"""Where a command computes: CUDA if there is any, else the CPU; one process or several."""

import torch
from accelerate import Accelerator


def new_accelerator() -> Accelerator:
    """The processes and the device of this run.

    Other accelerators (Apple's among them) are passed over: they lack float64 and the packed
    attention kernel. On a CPU several processes find each other through gloo.
    """
    return Accelerator(cpu=not torch.cuda.is_available())

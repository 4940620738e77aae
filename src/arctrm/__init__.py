"""arctrm: solve ARC-AGI tasks with a reader and a Tiny Recursive Model (TRM)."""

__version__ = "0.2.0"

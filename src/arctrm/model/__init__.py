"""The model: one trunk that reads and refines, its layout of grids, adapters for hub models."""

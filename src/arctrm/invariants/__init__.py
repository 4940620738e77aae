"""What all demonstrations of a task have in common, and which grids would break it."""

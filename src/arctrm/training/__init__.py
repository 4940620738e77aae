"""Training: loop, losses, optimisers, schedule, checkpoints, tracking."""

"""Training: sequences, steps of both voices, optimisers, the loop and its runs."""

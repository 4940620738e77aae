"""Pages to look at: tasks, a solution, an evaluation, each one HTML file without a network."""

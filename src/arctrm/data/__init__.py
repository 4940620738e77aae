"""Tasks, sources, views, canvas, the base set and the overlap guard (all without torch)."""

"""The reader: a LLaMA-family language model that reads a whole task and drafts grids."""

"""Readers: write and score grids, with the tiny trunk or a model of the Hugging Face hub."""

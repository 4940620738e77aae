"""Adapters: the reader's hidden states into TRM's latents, and TRM's latents back to the reader."""

from arctrm.adapters.draft import DraftAdapter, DraftCells, PlacedHidden, cell_table, place_hidden
from arctrm.adapters.latent_to_text import LatentToTextAdapter
from arctrm.adapters.layers import count_parameters
from arctrm.adapters.text_to_latent import Resampled, TextToLatentAdapter

__all__ = [
    "DraftAdapter",
    "DraftCells",
    "LatentToTextAdapter",
    "PlacedHidden",
    "Resampled",
    "TextToLatentAdapter",
    "cell_table",
    "count_parameters",
    "place_hidden",
]

"""TRM: layers, model, carry, import of reference checkpoints."""

from arctrm.trm.carry import Carry, ReferenceTRM
from arctrm.trm.model import TRM, Latents
from arctrm.trm.reference import load_reference

__all__ = ["TRM", "Carry", "Latents", "ReferenceTRM", "load_reference"]

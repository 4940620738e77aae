"""TRM's latents back to the reader: a soft prefix of a few vectors for the next attempt.

Latents come as rows of equal length with a mask, or packed as TRM computes them; both run through
the same packed attention, so the layout cannot change the prefix.

Legend: B rows, S cells of a padded row, T packed tokens, D width of TRM, P prefix vectors, H width
of the reader.
"""

import torch
from torch import Tensor, nn

from arctrm.adapters.layers import CrossBlock, linear, masked, packed, table
from arctrm.trm.layers import rms_norm

EMBEDDING_SCALE = 0.02
"""Root mean square of the token embeddings of a freshly initialised language model; trained ones
are near it (Llama 3: about 0.01)."""


class LatentToTextAdapter(nn.Module):
    """TRM -> reader.

    Args:
        trm_hidden_size: width D of TRM.
        llm_hidden_size: width H of the reader.
        num_prefix: vectors P of the soft prefix.
        num_heads: heads of the cross-attention; must divide D.
        output_scale: root mean square of the prefix at the start; that of the reader's token
            embeddings.
    """

    def __init__(
        self,
        trm_hidden_size: int = 512,
        llm_hidden_size: int = 4096,
        num_prefix: int = 4,
        num_heads: int = 8,
        output_scale: float = EMBEDDING_SCALE,
    ):
        super().__init__()
        self.trm_hidden_size = trm_hidden_size
        self.output_scale = output_scale
        self.queries = table(num_prefix, trm_hidden_size)
        self.from_H = linear(trm_hidden_size, trm_hidden_size)
        self.from_L = linear(trm_hidden_size, trm_hidden_size)
        self.block = CrossBlock(trm_hidden_size, num_heads)
        self.project = linear(trm_hidden_size, llm_hidden_size)

    def forward(self, z_H: Tensor, z_L: Tensor, mask: Tensor | None = None) -> Tensor:
        """Soft prefix [B, P, H] from latents [B, S, D]; bool mask [B, S] (True: read this token).

        A row with nothing to read gives a learned constant.
        """
        rows, length = z_H.shape[:2]
        row = torch.arange(rows, device=z_H.device).repeat_interleave(length)
        flat = None if mask is None else mask.flatten()
        return self.packed(z_H.flatten(0, 1), z_L.flatten(0, 1), row, rows, flat)

    def packed(
        self,
        z_H_TD: Tensor,
        z_L_TD: Tensor,
        row_T: Tensor,
        num_rows: int,
        mask_T: Tensor | None = None,
    ) -> Tensor:
        """Soft prefix [num_rows, P, H] from packed latents [T, D] of the rows `row_T`.

        Tokens of no row (`row_T` >= num_rows) and those where the bool mask [T] is False are not
        read.
        """
        readable = row_T < num_rows
        mask = readable if mask_T is None else readable & mask_T
        z_H, z_L = (
            masked(z, mask, self.trm_hidden_size, "LatentToTextAdapter") for z in (z_H_TD, z_L_TD)
        )
        keys = rms_norm(self.from_H(rms_norm(z_H)) + self.from_L(rms_norm(z_L)))
        queries = self.queries.expand(num_rows, -1, -1)
        x = self.block(queries, keys, packed(row_T, mask))
        return self.project(rms_norm(x)) * self.output_scale

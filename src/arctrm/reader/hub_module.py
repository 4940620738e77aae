"""What is trained of a hub reader, as a module: the rest of the model is in no checkpoint.

The model itself is no submodule, so that `state_dict`, optimisers and averages of a hybrid see only
the trained tensors (LoRA matrices, or all weights), under the names that the model gives them.
"""

import torch
from torch import Tensor, nn

from arctrm.config.reader import ReaderConfig
from arctrm.reader.hub import HubReader


class HubModule(nn.Module):
    """The trained parameters of a hub reader; `hub` is the reader, `config` what it is shown.

    They stand below `pretrained`: AdamW trains them, whatever trains the matrices of TRM.
    """

    def __init__(self, hub: HubReader, config: ReaderConfig):
        super().__init__()
        self.hub, self.config = hub, config
        self.pretrained = _tree(hub.trainable_parameters())
        self.dtypes = [parameter.dtype for parameter in self.parameters()]
        """Of the trained parameters where they are not trained: as they were loaded."""

    def train(self, mode: bool = True) -> "HubModule":
        """Training mode (dropout of LoRA) where something is trained."""
        super().train(mode)
        self.hub.train(mode)
        return self

    def trainable_copy(self) -> "HubModule":
        """Trained parameters of its own, float32, in the same model: the rest of it is shared.

        A frozen reader has none, and is itself.
        """
        old = list(self.parameters())
        if not old:
            return self
        new = [nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in old]
        copy = HubModule(self.hub.with_parameters(old, new), self.config)
        copy.dtypes = self.dtypes
        return copy

    def narrow(self) -> None:
        """The trained parameters in the dtypes that they answer in."""
        for parameter, dtype in zip(self.parameters(), self.dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)

    def embedding_scale(self) -> float:
        """Root mean square of the embeddings of the tokens that spell grids."""
        tokens = self.hub.grid_tokens
        ids = Tensor((*tokens.colours, tokens.row_end)).long().to(self.hub.device)
        return float(self.hub.embed(ids[None]).detach().float().square().mean().sqrt())


def _tree(parameters: dict[str, nn.Parameter]) -> nn.Module:
    """Modules in modules, so that a parameter has the dotted name that it is listed under."""
    root = nn.Module()
    for name, parameter in parameters.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, parameter)
    return root

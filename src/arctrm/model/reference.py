"""Published TRM checkpoints: the reference layout, its recursion, a loader.

The Tiny Recursive Model of arXiv 2510.04871 as its authors wrote it: grids on a 30x30 canvas, a
learned vector for every view of every task in the first of 16 prefix slots. In the paper's letters
x is the embedded question, y = z_H the answer, z = z_L the reasoning.

Legend: B rows, S = prefix slots + 900 cells, D width, A heads, K = D / A, V cell codes.
"""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from arctrm.config import StrictModel
from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid
from arctrm.data.views import SAME_COLOURS, View
from arctrm.errors import CheckpointError
from arctrm.model.trm import Asked, Refined, usual_tokens
from arctrm.system import parse_json, read_json

PAD, EOS, COLOUR = 0, 1, 2  # cell codes: outside of the grid, its border, colour 0
VOCABULARY = COLOUR + NUM_COLOURS
NUM_CELLS = MAX_SIDE**2
Turn = tuple[Tensor, Tensor]  # cosines and sines [S, K] of the rotary positions
State = tuple[Tensor, Tensor]  # z_H and z_L, both [B, S, D]


def encode(grid: Grid) -> np.ndarray:
    """Codes uint8 [30, 30] of a grid: EOS in the row below and the column right of it."""
    (height, width), codes = grid.shape, np.full((MAX_SIDE, MAX_SIDE), PAD, dtype=np.uint8)
    codes[height : height + 1, :width] = codes[:height, width : width + 1] = EOS
    codes[:height, :width] = grid + COLOUR
    return codes


def decode(codes: np.ndarray) -> Grid | None:
    """The grid on a canvas, as far as its first row and column go; None if it has a hole."""
    is_colour = np.pad(codes >= COLOUR, (0, 1))
    height, width = int(is_colour[:, 0].argmin()), int(is_colour[0].argmin())
    whole = height > 0 and is_colour[:height, :width].all()
    return (codes[:height, :width] - COLOUR).astype(np.uint8) if whole else None


class ReferenceConfig(StrictModel, extra="ignore"):
    """Sizes and cycles; the names are those of the reference implementation."""

    hidden_size: int = Field(ge=2, le=16384)
    num_heads: int = Field(ge=1, le=1024)
    L_layers: int = Field(ge=1, le=64)
    inner_size: int = Field(ge=1, le=2**20)  # of the SwiGLU
    H_cycles: int = Field(3, ge=1, le=64)
    L_cycles: int = Field(4, ge=1, le=64)
    puzzle_emb_len: int = Field(16, ge=1, le=1024)
    rope_theta: float = Field(10000.0, ge=1, le=1e9)
    halt_max_steps: int = Field(16, ge=1, le=1024)


class Block(nn.Module):
    """Attention and SwiGLU, each added and then normed; norms have no weight."""

    def __init__(self, config: ReferenceConfig):
        super().__init__()
        width, inner, self.num_heads = config.hidden_size, config.inner_size, config.num_heads
        linear = lambda given, made: nn.Linear(given, made, bias=False)
        qkv, out = linear(width, 3 * width), linear(width, width)
        self.self_attn = nn.ModuleDict({"qkv_proj": qkv, "o_proj": out})
        gate_up, down = linear(width, 2 * inner), linear(inner, width)
        self.mlp = nn.ModuleDict({"gate_up_proj": gate_up, "down_proj": down})

    def forward(self, x_BSD: Tensor, turn: Turn) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        qkv = self.self_attn["qkv_proj"](x_BSD).unflatten(-1, (3 * self.num_heads, -1))
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)  # (B, A, S, K)
        seen = F.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v)
        x = _norm(x_BSD + self.self_attn["o_proj"](seen.transpose(1, 2).flatten(2)))
        gate, up = self.mlp["gate_up_proj"](x).chunk(2, dim=-1)
        return _norm(x + self.mlp["down_proj"](F.silu(gate) * up))


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def _turned(x: Tensor, turn: Turn) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat((-second, first), dim=-1) * turn[1]


class ReferenceTRM(nn.Module):
    """TRM on batches {inputs [B, 900], puzzle_identifiers [B]}; names as in the reference."""

    H_init: Tensor
    L_init: Tensor

    def __init__(self, config: ReferenceConfig, num_embeddings: int):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.embed_tokens = nn.ParameterDict({"embedding_weight": torch.empty(VOCABULARY, width)})
        self.puzzle_emb = nn.ParameterDict({"weights": torch.empty(num_embeddings, width)})
        layers = nn.ModuleList(Block(config) for _ in range(config.L_layers))
        self.L_level = nn.ModuleDict({"layers": layers})
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.q_head = nn.Linear(width, 2)
        self.register_buffer("H_init", torch.empty(width))
        self.register_buffer("L_init", torch.empty(width))

    def forward(
        self, batch: dict[str, Tensor], state: State | None = None
    ) -> tuple[State, dict[str, Tensor]]:
        """One supervision step (figure 3): next state, logits [B, 900, V], q_halt_logits [B]."""
        x = self.embed(batch["inputs"], batch["puzzle_identifiers"])
        y, z = state or (self.H_init.expand_as(x), self.L_init.expand_as(x))
        turn = self.turn(x)
        with torch.no_grad():  # all cycles but the last are without gradient
            for _ in range(self.config.H_cycles - 1):
                y, z = self.cycle(x, y, z, turn)
        y, z = self.cycle(x, y, z, turn)
        logits = self.lm_head(y)[:, self.config.puzzle_emb_len :]
        q_halt = self.q_head(y[:, 0])[:, 0]
        return (y.detach(), z.detach()), {"logits": logits, "q_halt_logits": q_halt}

    def cycle(self, x: Tensor, y: Tensor, z: Tensor, turn: Turn) -> State:
        """Reason about question and answer `L_cycles` times, then better the answer."""
        for _ in range(self.config.L_cycles):
            z = z + (y + x)
            for layer in self.L_level["layers"].children():
                z = layer(z, turn)
        y = y + z
        for layer in self.L_level["layers"].children():
            y = layer(y, turn)
        return y, z

    def embed(self, codes: Tensor, view: Tensor) -> Tensor:
        """x [B, S, D]: the view's vector in slot 0, empty slots, the cells; times sqrt(D)."""
        cells = F.embedding(codes.long(), self.embed_tokens["embedding_weight"])
        vector = F.embedding(view.long(), self.puzzle_emb["weights"])[:, None]
        prefix = F.pad(vector, (0, 0, 0, self.config.puzzle_emb_len - 1))
        return torch.cat((prefix, cells), dim=1) * self.config.hidden_size**0.5

    def turn(self, like_BSD: Tensor) -> Turn:
        """Rotary positions along the slots and cells."""
        half = self.config.hidden_size // self.config.num_heads // 2
        places = torch.arange(like_BSD.shape[1], device=like_BSD.device, dtype=torch.float32)
        speeds = self.config.rope_theta ** -(torch.arange(half, device=places.device) / half)
        angles = (places[:, None] * speeds).repeat(1, 2)
        return angles.cos(), angles.sin()


class ReferenceRefiner:
    """Answers with a published checkpoint; the condition's `task` is the row of a view's vector."""

    def __init__(self, model: ReferenceTRM):
        self.model, self.halt_max_steps = model.eval(), model.config.halt_max_steps

    @torch.no_grad()
    def refine(
        self,
        asked: Sequence[Asked],
        num_steps: int | None = None,
        *,
        tokens_per_batch: int | None = None,
        keep_history: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Refined]:
        """See `Refiner.refine`; all steps are taken, as the reference implementation evaluates."""
        device, found = self.model.H_init.device, []
        per_batch = max(1, (tokens_per_batch or usual_tokens(device)) // NUM_CELLS)
        for first in range(0, len(asked), per_batch):
            chosen = asked[first : first + per_batch]
            codes = np.stack([encode(one.query).ravel() for one in chosen])
            views = torch.tensor([one.prompt.condition.task for one in chosen], device=device)
            batch = {"inputs": torch.from_numpy(codes).to(device), "puzzle_identifiers": views}
            state, answers, steps = None, [], num_steps or self.halt_max_steps
            for step in range(steps):
                state, said = self.model(batch, state)
                if keep_history or step == steps - 1:
                    canvases = said["logits"].unflatten(1, (MAX_SIDE, MAX_SIDE)).cpu()
                    both = zip(canvases, chosen, strict=True)
                    answers.append([read_off(canvas, one.shape) for canvas, one in both])
            for i, q in enumerate(said["q_halt_logits"].tolist()):
                history = tuple(after[i][0] for after in answers) if keep_history else ()
                grid, log_p = answers[-1][i]
                found.append(Refined(grid, q, log_p, steps, history))
            advance(len(chosen))
        return found


def read_off(logits: Tensor, shape: tuple[int, int]) -> tuple[Grid, float]:
    """The grid that logits [30, 30, V] say, and its log-probability (nats, stablemax)."""
    grid = decode(logits.argmax(-1).numpy())
    if grid is None:  # the likeliest colours of the size that was asked for
        grid = logits[: shape[0], : shape[1], COLOUR:].argmax(-1).numpy().astype(np.uint8)
    weight = torch.where(logits < 0, 1 / (1 - logits), logits + 1)  # arXiv 2501.04697
    log_p = (weight / weight.sum(-1, keepdim=True)).log()[: grid.shape[0], : grid.shape[1], COLOUR:]
    chosen = log_p.gather(-1, torch.from_numpy(grid).long()[..., None])
    return grid, float(chosen.sum())


# --- Reading files

# What leaves no trace in the weights.
_COUNTS = {"num_heads", "H_cycles", "L_cycles", "puzzle_emb_len", "rope_theta", "halt_max_steps"}


def read_reference_file(path: Path) -> ReferenceTRM:
    """A published checkpoint: safetensors, or a PyTorch state dict (only tensors are unpickled)."""
    config: Mapping[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                config = dict(parse_json((file.metadata() or {}).get("config", "{}")))
        else:
            with zipfile.ZipFile(path) as packed:  # older formats allocate what the pickle says
                if sum(part.file_size for part in packed.infolist()) > path.stat().st_size:
                    raise ValueError("parts larger than the file")
            weights = torch.load(path, map_location="cpu", weights_only=True)
        # A tensor in a .pt file may repeat its cells: a few bytes may declare any shape.
        if sum(t.numel() * t.element_size() for t in weights.values()) > path.stat().st_size:
            raise ValueError("tensors larger than the file")
        return load_reference(weights, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # of torch, zipfile, pickle, the system: by where they stumble
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a state dict of plain tensors ({reason})") from error


def load_reference(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> ReferenceTRM:
    """Model with the reference weights, float32; `config` is the reference's `arch` table.

    What it does not say is read off the weights, or is as in the published ARC models (H3 / L4,
    heads of 64). Wrappers' prefixes of names are dropped.
    """
    prefixes = r"^(?:weights\.|_orig_mod\.|module\.|model\.|inner\.)+"
    no_values = r"rotary_emb\.|embed_pos\.|local_(weights|ids)$"
    named = {re.sub(prefixes, "", str(key)): value for key, value in state_dict.items()}
    weights = {key: value.float() for key, value in named.items() if not re.search(no_values, key)}
    try:
        num_views, _ = weights["puzzle_emb.weights"].shape
        width, inner = weights["L_level.layers.0.mlp.down_proj.weight"].shape
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"holds no TRM weights ({error})") from error
    layers = {key.split(".")[2] for key in weights if key.startswith("L_level.layers.")}
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "L_layers": len(layers),
        "num_heads": max(1, width // 64),
    }
    fixed = {**sizes, "mlp_t": False, "pos_encodings": "rope"}
    for key, got in (config or {}).items():
        if key not in _COUNTS and got != fixed.get(key, got):
            raise CheckpointError(f"its configuration has {key} = {got!r}; only {fixed} fit")
    told = {key: got for key, got in (config or {}).items() if key in _COUNTS}
    try:
        chosen = ReferenceConfig(inner_size=inner, **sizes | told)
    except ValidationError as error:
        found = error.errors()[0]
        said = f"{'.'.join(map(str, found['loc']))} = {found['input']!r}: {found['msg']}"
        raise CheckpointError(f"its configuration has {said}") from error
    if width % (2 * chosen.num_heads):
        raise CheckpointError(f"{chosen.num_heads} heads do not divide a width of {width}")
    with torch.device("meta"):  # compared before anything of these sizes is made
        model = ReferenceTRM(chosen, num_views)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip()
        raise CheckpointError(f"does not fit the model: {fault}") from error
    return model


def reference_views(path: Path, num_embeddings: int) -> dict[str, list[tuple[View, int]]]:
    """Task id -> the views that have a vector, each with its row: from the identifiers.json beside
    the checkpoint `path`, a list of names `task`, or `task|||t3|||0213456789` (dihedral, colours).
    """
    file, views = path.with_name("identifiers.json"), {}  # type: Path, dict[str, list[Any]]
    try:
        names = read_json(file)
        if len(names) != num_embeddings:
            raise ValueError(f"lists {len(names)} vectors, {path.name} has {num_embeddings}")
        for row, name in enumerate(names):
            task_id, _, how = name.partition("|||")
            match = re.fullmatch(r"t([0-7])\|\|\|([0-9]{10})", how or "t0|||0123456789")
            if match is None or len(set(match[2])) != len(SAME_COLOURS):
                raise ValueError(f"{name!r} ends in no dihedral and permutation of ten")
            view = View(int(match[1]), tuple(map(int, match[2])))
            views.setdefault(task_id, []).append((view, row))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: {error}; copy the one of the training data there"
        ) from error
    return views

"""8-bit matrices: the error that is left, exact zeros, ragged widths, and strict reading."""

from pathlib import Path

import pytest
import torch

from arctrm.errors import CheckpointError
from arctrm.quantise import GROUP, dequantise, dequantise_all, is_quantised, quantise

HERE = Path("model.safetensors")


def matrix(*shape, seed=0, std=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def relative_error(x, group=GROUP):
    return float((dequantise(*quantise(x, group), group) - x).norm() / x.norm())


@pytest.mark.parametrize("shape", [(3, 64), (5, 512), (7, 100), (4, 32), (1, 1), (2, 65)])
def test_no_weight_is_off_by_more_than_half_a_step_of_its_group(shape):
    x = matrix(*shape)
    integers, scales = quantise(x)
    assert (integers.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    assert integers.shape == shape
    assert scales.shape == (shape[0], -(-shape[1] // GROUP))
    assert integers.min() >= -127
    back = dequantise(integers, scales)
    assert (back.dtype, back.shape) == (torch.float32, shape)
    step = scales.float().repeat_interleave(GROUP, 1)[:, : shape[1]]
    assert ((back - x).abs() <= 0.501 * step).all()


def test_the_error_is_below_a_hundredth_and_that_of_groups_below_that_of_rows():
    x = matrix(256, 512)
    assert 0.003 < relative_error(x) < 0.0075
    assert relative_error(x) < 0.85 * relative_error(x, group=512)


def test_zeros_stay_zeros_and_magnitude_does_not_matter():
    x = matrix(6, 128)
    x[2] = 0
    x[3, :GROUP] = 0
    x[4] = 0
    x[4, 5] = 1e-7
    back = dequantise(*quantise(x))
    assert (back[x == 0] == 0).all()
    assert back[4, 5] == pytest.approx(1e-7, rel=0.01)
    for power in (2.0**-60, 2.0**60):
        scaled = dequantise(*quantise(x * power))
        torch.testing.assert_close(scaled, back * power, atol=0, rtol=1e-6)


def test_matrices_of_layers_and_task_tables_are_meant_and_nothing_else():
    square = torch.zeros(2, 2)
    for name in ("trunk.layers.0.qkv_proj.weight", "trunk.task_emb", "layers.0.o_proj.weight"):
        assert is_quantised(name, square)
    assert is_quantised("trunk.feedback.layers.0.weight", square)
    for name in ("trunk.dihedral_emb", "trunk.head.weight", "hub.model.layers.0.q_proj.weight"):
        assert not is_quantised(name, square)
    assert not is_quantised("trunk.layers.0.input_norm", torch.zeros(2))
    assert not is_quantised("trunk.layers.0.count", torch.zeros(2, 2, dtype=torch.long))


def stored():
    integers, scales = quantise(matrix(3, 100))
    return {"a": integers, "b": torch.ones(2)}, {"a": scales}


@pytest.mark.parametrize(
    ("change", "group"),
    [
        (lambda t, s: s.clear(), GROUP),
        (lambda t, s: s.update(b=torch.ones(2, 1)), GROUP),
        (lambda t, s: t.pop("a"), GROUP),
        (lambda t, s: s.update(a=s["a"][:, :1]), GROUP),
        (lambda t, s: t.update(a=t["a"][0]), GROUP),
        (lambda t, s: None, None),
    ],
    ids=["no scales", "scales of floats", "no integers", "too few scales", "a vector", "no group"],
)
def test_integers_and_scales_that_do_not_belong_together_are_refused(change, group):
    tensors, scales = stored()
    change(tensors, scales)
    with pytest.raises(CheckpointError, match=r"safetensors: '.' .* is not stored as checkpoint"):
        dequantise_all(tensors, scales, group, HERE)

"""inference.dtype = "auto" on a CPU: bfloat16 only where it is faster."""

import pytest
import torch

from arctrm.solving import weights

AMD, INTEL = "AMD EPYC 9R14", "Intel(R) Xeon(R) Processor"


@pytest.mark.parametrize(
    ("name", "has", "expected"),
    [
        (AMD, ["avx512_bf16"], torch.bfloat16),
        (AMD, [], torch.float32),
        (INTEL, ["avx512_bf16"], torch.float32),
        (INTEL, ["avx512_bf16", "amx_bf16"], torch.bfloat16),
        ("Apple M3", [], torch.float32),
    ],
)
def test_bfloat16_is_used_where_it_is_faster(name, has, expected, monkeypatch):
    monkeypatch.setattr(weights, "processor", lambda: name)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    assert weights._inference_dtype("auto", torch.device("cpu")) == expected
    for said in ("float32", "bfloat16"):
        assert weights._inference_dtype(said, torch.device("cpu")) == getattr(torch, said)


def test_torch_without_capabilities_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert weights._inference_dtype("auto", torch.device("cpu")) == torch.float32

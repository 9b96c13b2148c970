"""Which sizes are rounded."""

import pytest
import torch

from plumbline.ops.shapes import MULTIPLE, product_dtype, size_multiple


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.bfloat16, MULTIPLE),
        ("cpu", torch.float32, 1),
        ("cpu", torch.float64, 1),
        ("cuda", torch.bfloat16, 1),
    ],
)
def test_only_narrow_products_on_a_cpu_are_rounded(
    device: str, dtype: torch.dtype, expected: int
) -> None:
    assert size_multiple(torch.device(device), dtype) == expected


def test_products_are_as_narrow_as_autocast_makes_them() -> None:
    cpu = torch.device("cpu")
    assert product_dtype(cpu, torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(cpu, torch.float32) == torch.bfloat16
    assert product_dtype(cpu, torch.bfloat16) == torch.bfloat16

"""P3 where something else wants the base, and launches kept by which pointers they have."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fused_route import RoutedAdapter, RoutedLinear, routed_linear

pytest.importorskip("triton")

from fused_route.kernels.launch import Launch

pytestmark = pytest.mark.interpret


def frozen() -> nn.Linear:
    return nn.Linear(8, 8).requires_grad_(False)


@pytest.mark.parametrize("strict", [True, False])
def test_p3_is_exported(strict: bool) -> None:
    layer = RoutedLinear(frozen(), 4, route="none", plan="p3", impl="triton")
    x = torch.randn(2, 3, 8)
    exported = torch.export.export(layer, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_hooks_on_all_modules_leave_p3_to_torch() -> None:
    layer = RoutedLinear(frozen(), 4, route="none", plan="p3", impl="triton")
    x, called = torch.randn(2, 3, 8), []
    expected = layer(x)
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
    try:
        torch.testing.assert_close(layer(x), expected)
    finally:
        hook.remove()
    assert layer.base in called


def test_a_bias_may_come_and_go() -> None:
    """Launches are kept by which pointers are absent: with a wrong key one would be read."""
    x, W, A, B = (torch.randn(*shape) for shape in ((2, 3, 8), (8, 8), (4, 8), (8, 4)))
    bias = torch.randn(8)
    seen: list[object] = []
    with mock.patch.object(
        Launch, "__call__", lambda self, absent, *_: seen.append((self, absent))
    ):
        for given in (bias, None):
            routed_linear(x, A, B, weight=W, bias=given, route="none", impl="triton", plan="p3")
    products = [entry for entry in seen if entry[0].kernel.fn.__name__ == "extended_product"]  # type: ignore[index]
    assert len(set(products)) == 2


def test_one_plan_goes_back_by_p3_and_by_p1() -> None:
    """With the key of K2's launch alike for both, the second would meet pointers of the first."""
    x, A, B = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 8), torch.randn(8, 4)
    wide = torch.randn(8, 16)
    seen: list[object] = []
    call = Launch.__call__

    def noted(self: Launch, absent: object, *rest: Any) -> None:
        if self.kernel.fn.__name__ == "routed_backward":
            seen.append(absent)
        call(self, absent, *rest)

    with mock.patch.object(Launch, "__call__", noted):
        for weight in (wide[:, :8].contiguous(), wide[:, ::2]):
            y = routed_linear(x, A, B, weight=weight, route="none", impl="triton", plan="p3")
            y.sum().backward()
    assert len(set(seen)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_infinity_stays_one_in_the_gradient_of_a_bias(dtype: torch.dtype) -> None:
    layer = RoutedAdapter(16, 4, route="none", impl="triton", dtype=dtype)
    y = layer(torch.randn(2, 3, 16).to(dtype))
    dy = torch.ones_like(y)
    dy[1, 2, 5] = torch.inf
    y.backward(dy)
    assert layer.b_B is not None and layer.b_B.grad is not None
    expected = torch.full((16,), 6.0, dtype=dtype)
    expected[5] = torch.inf
    assert torch.equal(layer.b_B.grad, expected)

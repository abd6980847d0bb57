"""The masks that kernels draw: from torch's seed, the same for any tiling and when recomputed."""

from typing import Any

import pytest
import torch
from kernel_cases import Call, Layer, assert_equal, gradients, run, trained
from tile_tables import tiles
from tiny_kernels import store_mask
from torch import nn

from fused_route import RoutedAdapter, RoutedLinear, Routing, ops
from fused_route.dropout import threshold

pytestmark = pytest.mark.interpret

SIZES: dict[str, Any] = {"S": 2, "T": 21, "d": 48, "n": 40, "r": 6}


@pytest.mark.parametrize("host", ["adapter", "linear_p3"])
@pytest.mark.parametrize("blocks", [{"BM": 16, "BN": 16}, {"BM": 64, "BN": 32}, {"BN": 128}])
def test_dropout_does_not_change_with_the_tiles(blocks: dict[str, Any], host: str) -> None:
    layer, call = Layer(host, **SIZES), Call(Routing("gram"), drops=True)
    t = trained(layer, call)
    truth = gradients(run(layer, call, t, 0.25, "triton"), t)
    with tiles(**blocks):
        other = gradients(run(layer, call, t, 0.25, "triton"), t)
    for name, tensor in truth.items():  # fp32: another order of the sums, but the same mask
        assert torch.allclose(tensor, other[name], rtol=1e-4, atol=1e-4), name
    assert not torch.equal(truth["y"], gradients(run(layer, call, t, 0.0, "triton"), t)["y"])


def test_the_mask_is_the_same_in_torch_bit_by_bit() -> None:
    """4 million elements: at a threshold of 2⁻³ some 64 have just its bits, and are kept."""
    rows, columns, p = 2048, 2048, 0.125
    seed = torch.tensor([0x1234_5678_9ABC_DEF])
    found = torch.zeros(rows, columns, dtype=torch.bool)
    store_mask[(8, 8)](seed, found, threshold(p), columns, 256, 256)
    assert torch.equal(found, ops.keep_mask(seed, (rows, columns), p, "x_r"))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_keep_what_they_should(p: float) -> None:
    shape = (200, 331)
    masks = [
        ops.keep_mask(torch.tensor([seed]), shape, p, stream).double()
        for seed in (0, 1, 1 << 40)
        for stream in ("x_h", "x_r")
    ]
    deviation = (p * (1 - p) / masks[0].numel()) ** 0.5
    for mask in masks:
        assert abs(float(mask.mean()) - (1 - p)) < 5 * deviation
        for axis in (0, 1):
            spread = (mask.mean(axis) - (1 - p)).square().mean().sqrt()
            assert float(spread) < 1.3 * (p * (1 - p) / mask.shape[axis]) ** 0.5
        for lag in (1, 2, 4, 8):  # neighbours share a call of the generator
            both = (mask[:, lag:] * mask[:, :-lag]).mean()
            assert abs(float(both) - (1 - p) ** 2) < 5 * deviation
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert abs(float((one * other).mean()) - (1 - p) ** 2) < 5 * deviation


def test_the_seed_comes_from_torch() -> None:
    layer = RoutedAdapter(16, 4, dropout=0.5, impl="triton")
    nn.init.normal_(layer.B)
    layer.context.set(torch.randn(2, 16))
    x_h = torch.randn(2, 5, 16)
    torch.manual_seed(5)
    first, second = layer(x_h), layer(x_h)
    torch.manual_seed(5)
    assert torch.equal(first, layer(x_h)) and not torch.equal(first, second)
    state = torch.get_rng_state()
    layer.eval()
    assert torch.equal(layer(x_h), layer(x_h))
    assert torch.equal(state, torch.get_rng_state()), "drew without dropping"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_mask(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = RoutedLinear(nn.Linear(16, 8).requires_grad_(False), 4, dropout=0.5, impl="triton")
    nn.init.normal_(layer.B)
    layer.context.set(torch.randn(2, 16))
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        x_h = torch.linspace(-1, 1, 160).view(2, 5, 16).requires_grad_()
        block = layer.context.captured(layer)
        y = checkpoint(block, x_h, use_reentrant=use_reentrant) if checkpointed else layer(x_h)
        torch.randn(3)  # what else a model draws
        t = {"x_h": x_h, "A": layer.A, "B": layer.B}
        for leaf in t.values():
            leaf.grad = None
        y.square().sum().backward()
        results.append({name: leaf.grad.clone() for name, leaf in t.items()})  # type: ignore[union-attr]
    assert_equal(*results)

"""x_v of all layers in one product: equal results and gradients, fewer launches, never stale."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.offline.count_launches import count
from fused_route import Attached, RoutedConfig, RoutingInput, attach

D, LAYERS = 8, 6
ROUTES = ["add", "mul", "gram", "expand", "gram_relu", "ones"]


def attached(project: str, route: str = "mul", **settings: Any) -> Attached:
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(D, D) for _ in range(LAYERS)))
    found = attach(model, RoutedConfig(r"\d", r=4, route=route, **settings), project=project)
    for layer in found.layers.values():
        nn.init.normal_(layer.B)
    return found


def uses(found: Attached, x_r: Tensor | RoutingInput) -> list[bool]:
    """Which layers take x_v from the context."""
    with found.using(x_r):
        return [
            layer.routing_input(torch.zeros(2, 1, D)).x_v is not None  # type: ignore[union-attr]
            for layer in found.layers.values()
        ]


@pytest.mark.parametrize("Nv", [1, 5])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("host", ["lora", "adapter"])
def test_results_and_gradients_are_equal(host: str, route: str, Nv: int) -> None:
    x, x_r = torch.randn(2, 3, D), torch.randn(2, Nv, D)
    mask = torch.ones(2, Nv, dtype=torch.bool)
    mask[1, Nv // 2 :] = False
    results = []
    for project in ("layer", "together"):
        found = attached(project, route, host=host)
        image = x_r.clone().requires_grad_()
        assert uses(found, image) == [project == "together"] * LAYERS
        with found.using(RoutingInput(image, mask)):
            y = found.model(x)
        y.square().sum().backward()
        gradients = [p.grad for p in found.trainable_parameters()]
        results.append([y, image.grad, *gradients])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_used_by_itself_without_gradients(autocast: bool) -> None:
    found, image = attached("auto"), torch.randn(2, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert not any(uses(found, image))
        with torch.no_grad():
            assert all(uses(found, image))
        assert not any(uses(attached("auto", "expand"), image))
    few = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    with torch.no_grad():
        assert not any(uses(attach(few, RoutedConfig(r"\d", r=4)), image))
        split = attached("auto", inner_rank=2)
        with split.using(image):
            assert not any(split.context.projected(i) for i in range(LAYERS))


def test_only_what_is_current_is_used() -> None:
    found, image = attached("together"), torch.randn(2, D)
    first = next(iter(found.layers.values()))
    x_h = torch.zeros(2, 1, D)

    def used() -> bool:
        return first.routing_input(x_h).x_v is not None  # type: ignore[union-attr]

    with found.using(image):
        assert used() and not used()  # a graph serves one forward
    with torch.no_grad(), found.using(image):
        assert used() and used()
        first.A.add_(1.0)  # an optimiser's step
        assert not used()
        found.context.set(image)
        assert used()
        with torch.autocast("cpu", torch.bfloat16):
            assert not used()  # projected at another precision
        with torch.enable_grad():
            assert not used()  # projected without a graph
        first.A = nn.Parameter(first.A.clone())
        assert not used()
        found.model.train()
        first.dropout = 0.5
        found.context.set(image)
        assert not used()  # each layer drops by itself
    found.model.eval()
    found.detach()
    assert found.context.together.layers == [] and first.slot == -1


def test_widths_and_ranks_are_projected_apart() -> None:
    model = nn.ModuleDict({"a": nn.Linear(D, 4), "b": nn.Linear(4, D), "c": nn.Linear(D, D)})
    found = attach(model, RoutedConfig(["a", "b", "c"], r=3, visual_width=5), project="together")
    with found.using(torch.randn(2, 5)):
        shapes = {
            name: found.context.projected(layer.slot).x_v.shape  # type: ignore[union-attr]
            for name, layer in found.layers.items()
        }
    assert shapes == {"a": (2, 1, 3), "b": (2, 1, 3), "c": (2, 1, 3)}


def launched(project: str, impl: Any, *, trains: bool) -> tuple[int, int]:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(LAYERS))).bfloat16()
    found = attach(model, RoutedConfig(r"\d", r=16), project=project, impl=impl)
    x, image = torch.randn(2, 3, 16).bfloat16(), torch.randn(2, 16).bfloat16()
    out: list[Tensor] = []

    def forward() -> None:
        with torch.set_grad_enabled(trains), found.using(image):
            out.append(found.model(x))

    forward()
    forwards = sum(count(forward).counts.values())
    if not trains:
        return forwards, 0
    dy = torch.ones_like(out[-1])
    return forwards, sum(count(lambda: out[-1].backward(dy)).counts.values())


@pytest.mark.interpret
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.usefixtures("unpoisoned")
def test_launches(impl: str) -> None:
    """One launch a layer less without gradients, two more; with them, kernels gain nothing."""
    assert launched("layer", impl, trains=False)[0] == launched("auto", impl, trains=False)[0] + 4
    assert launched("layer", impl, trains=True) == launched("auto", impl, trains=True)
    layer, together = (launched(p, impl, trains=True) for p in ("layer", "together"))
    if impl == "triton":
        assert sum(together) > sum(layer)
    else:
        assert sum(together) < sum(layer)

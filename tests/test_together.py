"""x_v of all layers in one product: equal results and gradients, fewer launches, never stale."""

import copy
import pickle
from itertools import islice, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.offline.count_launches import count
from fused_route import Attached, RoutedConfig, RoutingInput, attach, bottleneck, together

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


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if launches were what counts."""
    monkeypatch.setattr(together, "saves_launches", lambda x_r: True)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("autocast", [False, True])
def test_used_by_itself_without_gradients(autocast: bool) -> None:
    found, image = attached("auto"), torch.randn(2, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert not any(uses(found, image))
        with torch.no_grad():
            assert all(uses(found, image))
            assert not any(uses(attached("auto", "expand"), image))
            assert all(uses(attached("together", "expand"), image))
    few = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    with torch.no_grad():
        assert not any(uses(attach(few, RoutedConfig(r"\d", r=4)), image))
        split = attached("auto", inner_rank=2)
        with split.using(image):
            assert not split.context._thread.held.projected


def test_not_used_by_itself_on_a_cpu() -> None:
    with torch.no_grad():
        assert not any(uses(attached("auto"), torch.randn(2, D)))


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
        first.A.data = first.A.data.clone()  # an average swapped in
        assert not used()
        found.context.set(image)
        first.A = nn.Parameter(first.A.detach())  # the same memory and version
        assert not used()
        found.context.set(image)
        image.add_(1.0)  # a static buffer
        assert not used()
        found.model.train()
        first.dropout = 0.5
        found.context.set(image)
        assert not used()  # each layer drops by itself


@pytest.mark.usefixtures("on_a_gpu")
def test_a_captured_graph_reads_no_x_v_from_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything else read one that is there after a replay alone."""
    found, image = attached("auto"), torch.randn(2, D)
    first = next(iter(found.layers.values()))
    during = dict.fromkeys(("made", "used"), False)
    monkeypatch.setattr(together, "is_captured", lambda x_r: during["made"])
    monkeypatch.setattr(bottleneck, "is_captured", lambda x_r: during["used"])
    for made, used in product((False, True), repeat=2):
        during |= {"made": made, "used": used}
        with torch.no_grad(), found.using(image):
            given = first.routing_input(torch.zeros(2, 1, D))
        assert given is not None and (given.x_v is not None) == (made == used)


def test_other_threads_may_add_layers_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    found, others = attached("together"), attached("together").layers.values()
    left = iter(others)

    def adds_another(layer: together.Projecting) -> bool:
        for other in islice(left, 1):  # as its first call does, in a copy of a model
            found.context.together.add(other, "together")
        return True

    monkeypatch.setattr(together, "is_plain", adds_another)
    with found.using(torch.randn(2, D)):
        assert len(found.context._thread.held.projected) == LAYERS
    assert all(other in found.context.together for other in others)


def test_a_bias_counts_too() -> None:
    found, image = attached("together", host="adapter"), torch.randn(2, D)
    first: Any = next(iter(found.layers.values()))
    x_h = torch.zeros(2, 1, D)
    with torch.no_grad(), found.using(image):
        first.b_A.add_(1.0)
        assert first.routing_input(x_h).x_v is None
    first.A.requires_grad_(False)
    with torch.no_grad(), found.using(image), torch.enable_grad():
        assert first.routing_input(x_h).x_v is None  # its gradient goes through x_v as well


def test_the_image_may_want_the_gradient() -> None:
    found, image = attached("together"), torch.randn(2, D, requires_grad=True)
    found.model.requires_grad_(False)
    first = next(iter(found.layers.values()))
    with torch.no_grad(), found.using(image), torch.enable_grad():
        assert first.routing_input(torch.zeros(2, 1, D)).x_v is None  # type: ignore[union-attr]


@pytest.mark.parametrize("odd", ["meta", "inference", "subclass"])
def test_what_cannot_be_stacked_projects_by_itself(odd: str) -> None:
    found, image = attached("together"), torch.randn(2, D)
    first = next(iter(found.layers.values()))
    if odd == "meta":
        first.to("meta")
    elif odd == "inference":
        with torch.inference_mode():
            first.A = nn.Parameter(torch.randn(4, D), requires_grad=False)
    else:
        first.A = nn.Parameter(torch.randn(4, D).as_subclass(Sharded))
    with torch.no_grad(), found.using(image):
        made = [found.context.projected(layer) for layer in found.layers.values()]
    assert made[0] is None and None not in made[1:]


class Sharded(torch.Tensor):
    """Stands for tensors that are not torch's own, such as DTensor."""


def test_layers_are_held_weakly_and_not_copied() -> None:
    found = attached("together")
    model: Any = found.model
    alone = len(pickle.dumps(attached("layer").model[0]))  # type: ignore[index]
    assert len(pickle.dumps(model[0])) < 2 * alone
    copied = copy.deepcopy(model)
    image, x = torch.randn(2, D), torch.randn(2, 1, D)
    context = copied[0].context
    with torch.no_grad(), context.using(image):
        expected = copied(x)
        assert not context._thread.held.projected
    with torch.no_grad(), context.using(image):  # they came in when they were called
        torch.testing.assert_close(copied(x), expected)
        assert len(context._thread.held.projected) == LAYERS
    context_of_all = found.context
    layer = next(iter(found.layers.values()))
    found.detach()
    assert layer not in context_of_all.together


def test_compiled_models_project_by_themselves() -> None:
    found, image, x = attached("together"), torch.randn(2, D), torch.randn(2, 3, D)
    compiled = torch.compile(found.model, fullgraph=True, backend="eager")
    with torch.no_grad(), found.using(image):
        torch.testing.assert_close(compiled(x), found.model(x))


def test_widths_and_ranks_are_projected_apart() -> None:
    model = nn.ModuleDict({"a": nn.Linear(D, 4), "b": nn.Linear(4, D), "c": nn.Linear(D, D)})
    found = attach(model, RoutedConfig(["a", "b", "c"], r=3, visual_width=5), project="together")
    biased = attach(
        nn.ModuleDict({"d": nn.Linear(4, 4)}),
        RoutedConfig(["d"], host="adapter", r=3),
        found.context,
        project="together",
    )
    layers = {**found.layers, **biased.layers}
    with found.using(torch.randn(2, 5)):
        made = {name: found.context.projected(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            x_r, x_v = found.context.get(layer.d, name).x_r, made[name]
            assert x_v is not None
            torch.testing.assert_close(x_v.x_v, nn.functional.linear(x_r, layer.A, layer.b_A))


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
@pytest.mark.usefixtures("unpoisoned", "on_a_gpu")
def test_launches(impl: str) -> None:
    """One launch a layer less without gradients, two more; with them, kernels gain nothing."""
    assert launched("layer", impl, trains=False)[0] == launched("auto", impl, trains=False)[0] + 4
    assert launched("layer", impl, trains=True) == launched("auto", impl, trains=True)
    layer, together = (launched(p, impl, trains=True) for p in ("layer", "together"))
    if impl == "triton":
        assert sum(together) > sum(layer)
    else:
        assert sum(together) < sum(layer)

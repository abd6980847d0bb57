"""Updates of layers that no image routes merged into their bases: equal, or refused."""

import copy
from typing import Any

import pytest
import torch
from test_attach import IDS, bert
from test_fold import D, assert_untouched, called, layer, values
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fused_route import RoutedConfig, RoutedLinear, attach, merge
from fused_route.testing import assert_as_good_as_eager


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merging(dtype: torch.dtype) -> None:
    for host in ("linear", "conv1d"):
        made = layer(host, "none").to(dtype)
        assert isinstance(made, RoutedLinear)
        nn.init.normal_(made.B, std=0.3)
        model = nn.Sequential(made, nn.Identity())
        x_h = torch.randn(2, 30, D).to(dtype)
        truth, eager = copy.deepcopy(model).double()(x_h.double()), model(x_h)
        base = made.base
        assert merge(model) is model and model[0] is base
        if dtype == torch.float64:
            torch.testing.assert_close(model(x_h), truth, rtol=1e-12, atol=1e-12)
        else:
            assert_as_good_as_eager({"y": model(x_h)}, {"y": truth}, {"y": eager})


def test_merging_an_attached_model() -> None:
    model = bert()
    keys = model.state_dict().keys()
    flags = [p.requires_grad for p in model.parameters()]
    attached = attach(model, RoutedConfig(["query", "value"], route="none", train=("norms",)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected = model(IDS)[0]
    running = nn.BatchNorm1d(3)
    running.running_mean = torch.randn(3)
    model.add_module("statistics", running)
    assert attached.merge() is model
    assert running.running_mean.any()
    del model.statistics
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(model(IDS)[0], expected, rtol=1e-4, atol=1e-5)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ValueError, match="were detached"):
        attached.merge()


def test_what_cannot_be_merged_is_refused() -> None:
    tied = nn.Sequential(layer("without_bias", "none"), nn.Linear(D, D))
    base: Any = tied[0].base
    tied[1].weight = nn.Parameter(base.weight.data)
    for model, message in (
        (layer("linear", "mul"), "no weight holds it for all images; fold"),
        (layer("adapter", "none"), "is an adapter: only routed linear layers merge"),
        (nn.Linear(2, 2), "model=Linear has no routed layer"),
        (called("none"), "needs a base that is a plain"),
        (tied, "tied to another module's"),
        (nn.Sequential(layer("linear", "none"), layer("linear", "mul")), "fold"),
    ):
        before = values(model)
        with pytest.raises(ValueError, match=message):
            merge(model)
        assert_untouched(model, before)
    shared = layer("linear", "none")
    twice = nn.ModuleDict({"a": shared, "b": shared})
    merge(twice)
    assert twice["a"] is twice["b"] is shared.base
    model = nn.Sequential(nn.Linear(D, D))
    attached = attach(model, RoutedConfig(["0"], route="none"))
    merge(model)
    with pytest.raises(ValueError, match="were merged into the model: there is no way back"):
        attached.detach()
    alone = layer("linear", "none")
    assert isinstance(alone, RoutedLinear) and merge(alone) is alone.base


def test_parameters_may_be_views_of_one_buffer() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
    attached = attach(model, RoutedConfig(["0", "1"], route="none"))
    for inner in attached.layers.values():
        nn.init.normal_(inner.B)
    x = torch.randn(3, D)
    expected = model(x)
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    torch.testing.assert_close(attached.merge()(x), expected)


def test_overlapping_views_of_one_buffer_are_tied() -> None:
    tied = nn.Sequential(layer("without_bias", "none"), nn.Linear(D, D, bias=False))
    base: Any = tied[0].base
    flat = torch.randn(D * D + D)
    base.weight.data, tied[1].weight.data = flat[:-D].view(D, D), flat[D:].view(D, D)
    with pytest.raises(ValueError, match="tied to another module's"):
        merge(tied)

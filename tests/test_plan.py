"""The plan of a linear layer: who takes it, who refuses it, what "auto" is, what runs by it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_cases import assert_equal, gradients
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fused_route import (
    RoutedConfig,
    RoutedLinear,
    attach,
    autograd,
    coverage,
    fold,
    fused,
    known,
    modules,
    ops,
    plan,
    routed_linear,
)
from fused_route.layout import layout_of
from fused_route.plan import Plan

D, N, R = 16, 24, 4
X_H, IMAGE = torch.randn(2, 5, D), torch.randn(2, 1, D)


def linear(base: Any = None, **settings: Any) -> RoutedLinear:
    """A layer around a frozen base, the same every time, whose update is not zero."""
    torch.manual_seed(1)
    base = nn.Linear(D, N) if base is None else base
    if isinstance(base, nn.Module):
        base.requires_grad_(False)
    layer = RoutedLinear(base, R, **settings)
    nn.init.normal_(layer.B)
    layer.context.set(IMAGE)
    return layer


def found(layer: RoutedLinear) -> dict[str, Tensor]:
    """y and all gradients."""
    x = X_H.clone().requires_grad_()
    named = {"x": x, **{k: p for k, p in layer.named_parameters() if p.requires_grad}}
    return gradients(layer(x), named)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-4, msg=name)


@contextmanager
def products() -> Iterator[Callable[[], list[str]]]:
    """The directions in which P3's product ran."""
    real = Plan.extended_product
    with mock.patch.object(Plan, "extended_product", autospec=True, side_effect=real) as product:
        yield lambda: [call.args[1] for call in product.call_args_list]


def two() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))


# Who takes it


def test_layers_and_attached_layers_keep_it() -> None:
    assert linear().plan == "auto" and linear(plan="p3").plan == "p3"
    plans = [layer.plan for layer in attach(two(), RoutedConfig(r"\d", r=R)).layers.values()]
    assert plans == ["auto"] * 2
    attached = attach(two(), RoutedConfig(r"\d", r=R), plan="p1")
    assert [layer.plan for layer in attached.layers.values()] == ["p1"] * 2


def test_adapters_ignore_it() -> None:
    attached = attach(two(), RoutedConfig(r"\d", r=R, host="adapter"), plan="p3")
    with attached.using(IMAGE):
        assert attached.model(X_H).shape == X_H.shape
    assert not any(hasattr(layer, "plan") for layer in attached.layers.values())


def test_it_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    attach(two(), RoutedConfig(r"\d", r=R), plan="p3").save(tmp_path)
    assert "plan" not in json.loads((tmp_path / "adapter_config.json").read_text())
    for asked, attached in (
        ("auto", attach(two(), tmp_path)),
        ("p1", attach(two(), tmp_path, plan="p1")),
    ):
        assert [layer.plan for layer in attached.layers.values()] == [asked] * 2


def test_layers_of_peft_have_it_as_they_have_impl() -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    from fused_route.peft import RoutedAdapterConfig, RoutedLoraConfig

    for config, has in ((RoutedLoraConfig, True), (RoutedAdapterConfig, False)):
        model = peft.get_peft_model(two(), config(r=R, target_modules=["0", "1"]))
        views = [m.views["default"] for m in model.modules() if hasattr(m, "views")]
        assert [(view.impl, getattr(view, "plan", None)) for view in views] == [
            ("auto", "auto" if has else None)
        ] * 2


def test_experiments_pass_it_on() -> None:
    tuning = pytest.importorskip("fused_route.training.experiment.tuning")
    config = RoutedConfig(r"\d", r=R)
    with mock.patch.object(tuning, "attach") as attaching:
        tuning.tune(two(), config, impl="reference", plan="p1")
    assert attaching.call_args.kwargs == {"impl": "reference", "plan": "p1"}


@pytest.mark.parametrize("images", [None, 1, 2], ids=["routed", "folded", "folded a batch"])
def test_calls_pass_it_on_with_an_image_folded_in_too(images: int | None) -> None:
    attached = attach(two().eval(), RoutedConfig(r"\d", r=R, route="mul"), plan="p1")
    with (
        mock.patch.object(modules, "routed_linear", wraps=routed_linear) as called,
        torch.no_grad(),
        attached.using(IMAGE) if images is None else fold(attached.model, IMAGE[:images]),
    ):
        attached.model(X_H)
    assert [call.kwargs["plan"] for call in called.call_args_list] == ["p1"] * 2


# Who refuses it


class Sub(nn.Linear):
    """Not F.linear of its weight, for all anyone knows."""


class Int8(nn.Module):
    """A quantised base."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = D, N
        self.register_buffer("weight", torch.ones(N, D, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).T


def hooked() -> nn.Module:
    base = nn.Linear(D, N)
    base.register_forward_hook(lambda module, args, out: out + 1.0)
    return base


def by_peft() -> nn.Module:
    """A linear layer with PEFT's own LoRA."""
    peft = pytest.importorskip("peft", minversion="0.21")
    model = nn.Sequential(nn.Linear(D, N))
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    kept: nn.Module = made.base_model.model[0]
    return kept


CALLED = {"subclass": lambda: Sub(D, N), "quantised": Int8, "hooked": hooked, "peft": by_peft}


@pytest.mark.parametrize("kind", CALLED)
def test_a_base_without_a_plain_weight_refuses_p3(kind: str) -> None:
    kept = {"dtype": torch.float32} if kind == "quantised" else {}
    layer = linear(CALLED[kind](), plan="p3", **kept)
    layer.label = "block.0.query"
    with pytest.raises(ValueError, match=r"block\.0\.query: plan='p3' needs .* base=\w+ is called"):
        layer(X_H)
    y = []
    for asked in ("auto", "p1"):
        layer.plan = asked
        y.append(layer(X_H))
    assert torch.equal(*y)


def test_more_arguments_refuse_p3() -> None:
    """The base is then called, with all of them."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
            return super().forward(x) * by

    for base in (nn.Linear(D, N), Scaled(D, N)):
        with pytest.raises(ValueError, match=r"RoutedLinear: plan='p3' needs"):
            linear(base, plan="p3")(X_H, 2.0)
    linear(Scaled(D, N))(X_H, 2.0)


def test_a_trained_base_refuses_p3_while_it_trains() -> None:
    layer = linear(plan="p3")
    y = layer(X_H)
    layer.base.weight.requires_grad_()
    with pytest.raises(
        ValueError, match=r"plan='p3' needs the weight of a frozen base, got one th"
    ):
        layer(X_H)
    with torch.no_grad():
        assert torch.equal(layer(X_H), y)


@pytest.mark.interpret
@pytest.mark.parametrize("base", ["trained", "quantised"])
def test_other_bases_run_as_before(base: str) -> None:
    results = []
    for asked in ("auto", "p1"):
        layer = (
            linear(Int8(), plan=asked, dtype=torch.float32, impl="triton")
            if base == "quantised"
            else linear(plan=asked, impl="triton")
        )
        layer.base.requires_grad_(base == "trained")
        with mock.patch.object(plan, "major_of", return_value=9), products() as ran:
            results.append(found(layer))
        assert ran() == []
    assert_equal(*results)


# What "auto" is

CHOICES: list[tuple[int | None, torch.dtype, int, int, str]] = [
    (9, torch.bfloat16, 1024, 8192, "p3"),
    (9, torch.float16, 768, 8192, "p3"),
    (9, torch.bfloat16, 1024, 8191, "p1"),
    (9, torch.bfloat16, 1040, 8192, "p1"),
    (9, torch.float32, 768, 8192, "p1"),
    (8, torch.bfloat16, 768, 8192, "p1"),
    (10, torch.bfloat16, 768, 8192, "p1"),
    (None, torch.bfloat16, 768, 8192, "p1"),
]


@contextmanager
def launched() -> Iterator[list[str]]:
    """As on a GPU, where nothing is launched: the plans of the calls."""
    plans: list[str] = []

    def eager(chosen: Plan, longest: int, s: float, t: ops.Inputs) -> Tensor:
        plans.append(chosen.f.plan)
        return t.x

    with (
        mock.patch.object(coverage, "device_obstacle", return_value=None),
        mock.patch.object(autograd, "eager", eager),
        mock.patch.object(known, "_KNOWN", {}),
    ):
        yield plans


@pytest.mark.parametrize(("major", "dtype", "d", "rows", "chosen"), CHOICES, ids=str)
def test_what_auto_chooses(
    major: int | None, dtype: torch.dtype, d: int, rows: int, chosen: str
) -> None:
    base = nn.Linear(d, 8, dtype=dtype).requires_grad_(False)
    x_h, image = torch.zeros(1, rows, d, dtype=dtype), torch.zeros(1, d, dtype=dtype)
    with mock.patch.object(plan, "major_of", return_value=major), launched() as plans:
        for asked in ("auto", "p1", "p3"):
            layer = RoutedLinear(base, 4, impl="triton", plan=asked)
            with layer.context.using(image):
                layer(x_h)
                layer(x_h)  # known
        base.requires_grad_()
        layer.plan = "auto"
        with layer.context.using(image):
            layer(x_h)
    assert plans == [chosen] * 2 + ["p1"] * 2 + ["p3"] * 2 + ["p1"]


def test_one_layer_may_run_by_both() -> None:
    """Few rows and many: what is known of a call is known of its size alone."""
    layer = linear(nn.Linear(64, 8, dtype=torch.bfloat16), impl="triton")
    layer.context.set(torch.zeros(1, 64, dtype=torch.bfloat16))
    with mock.patch.object(plan, "major_of", return_value=9), launched() as plans:
        for rows in (8192, 64, 8192):
            layer(torch.zeros(1, rows, 64, dtype=torch.bfloat16))
    assert plans == ["p3", "p1", "p3"]


@pytest.mark.parametrize(
    ("device", "hip", "major"), [("cuda", None, 9), ("cuda", "6.0", None), ("cpu", None, None)]
)
def test_the_capability_is_of_nvidia_alone(device: str, hip: str | None, major: int | None) -> None:
    with (
        mock.patch.object(torch.version, "hip", hip),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        assert plan.major_of.__wrapped__(torch.device(device)) == major


# What runs by it


@pytest.mark.interpret
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("route", ["none", "mul", "gram"])
@pytest.mark.parametrize("host", ["linear", "qv"])
def test_both_agree(host: str, route: str, dropout: float) -> None:
    """With the same masks; the numbers themselves are test_kernels.py's."""
    fused_qkv: dict[str, Any] = {"adapted": (2, 0), "of": 3} if host == "qv" else {}
    results = []
    for asked in ("p1", "p3"):
        layer = linear(impl="triton", plan=asked, route=route, dropout=dropout, **fused_qkv)
        torch.manual_seed(5)
        with products() as ran:
            results.append(found(layer))
        assert ran() == ([] if asked == "p1" else ["forward", "backward"])
    close(*results)


@pytest.mark.interpret
def test_compilers_are_told_of_it() -> None:
    layer = linear(impl="triton", plan="p3")
    eager = found(layer)

    def by_operator(chosen: Plan, longest: int, s: float, *tensors: Any) -> Tensor:
        return autograd.traced(chosen.f, longest, s, ops.Inputs(*tensors))

    with mock.patch.object(autograd.Routed, "apply", by_operator), products() as ran:
        assert_equal(eager, found(layer))
    assert ran() == ["forward", "backward"]


SMALL = 0.2  # of two layers' parameters: outputs of 1, not of thousands that cancel to 1


@pytest.mark.interpret
@pytest.mark.parametrize("project", ["layer", "together"])
def test_attached_layers_agree(project: str) -> None:
    results = []
    for asked in ("p1", "p3"):
        attached = attach(
            two(), RoutedConfig(r"\d", r=R), impl="triton", plan=asked, project=project
        )
        torch.manual_seed(3)
        for layer in attached.layers.values():
            nn.init.normal_(layer.A, std=SMALL), nn.init.normal_(layer.B, std=SMALL)
        named: dict[str, Tensor] = dict(attached.model.named_parameters())
        with products() as ran, attached.using(IMAGE):
            results.append(gradients(attached.model(X_H), named))
        # the first layer's input has no gradient
        assert ran() == ([] if asked == "p1" else ["forward", "forward", "backward"])
    close(*results)


@pytest.mark.interpret
def test_layers_of_peft_agree() -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    from fused_route.peft import RoutedLoraConfig, context_of

    results = []
    for asked in ("p1", "p3"):
        model = peft.get_peft_model(two(), RoutedLoraConfig(r=R, target_modules=["0", "1"]))
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=SMALL)
        for module in model.modules():
            if hasattr(module, "views"):
                module.views["default"].plan, module.views["default"].impl = asked, "triton"
        named = {k: p for k, p in model.named_parameters() if p.requires_grad}
        with products() as ran, context_of(model).using(IMAGE):
            results.append(gradients(model(X_H), named))
        assert len(ran()) == (3 if asked == "p3" else 0)
    close(*results)


@pytest.mark.interpret
def test_a_conv1d_is_read_where_it_is() -> None:
    """GPT-2's layers keep their weight transposed; nothing copies it."""
    results = []
    real = Plan.extended_product
    for asked in ("p1", "p3"):
        torch.manual_seed(4)
        base = Conv1D(3 * D, D)
        layer = linear(base, adapted=(0, 2), of=3, impl="triton", plan=asked)
        with mock.patch.object(Plan, "extended_product", autospec=True, side_effect=real) as ran:
            results.append(found(layer))
        weights = [call.args[3] for call in ran.call_args_list]
        assert len(weights) == (2 if asked == "p3" else 0)
        for weight in weights:
            assert weight.shape == (3 * D, D) and layout_of(weight) == "columns"
            assert weight.data_ptr() == base.weight.data_ptr()
    close(*results)


def strided() -> Tensor:
    return torch.randn(2 * N, D)[::2]


def unaligned() -> Tensor:
    return torch.randn(N * D + 1)[1:].view(N, D)


@pytest.mark.interpret
@pytest.mark.parametrize("stored", [strided, unaligned])
def test_a_weight_that_lies_otherwise_runs_by_p1(stored: Callable[[], Tensor]) -> None:
    results = []
    for asked in ("p1", "p3"):
        torch.manual_seed(4)
        base = nn.Linear(D, N)
        base.weight = nn.Parameter(stored())
        assert layout_of(base.weight) is None
        with products() as ran:
            results.append(found(linear(base, impl="triton", plan=asked)))
        assert ran() == []
    assert_equal(*results)


@pytest.mark.interpret
def test_a_trained_base_runs_by_p3_without_gradients() -> None:
    layer = linear(impl="triton", plan="p3")
    layer.base.requires_grad_()
    with torch.no_grad(), products() as ran, mock.patch.object(fused, "run", wraps=fused.run) as by:
        y = layer(X_H)
    assert ran() == ["forward"] and by.call_args[0][0].fusion.base == "frozen"
    layer.plan = "p1"
    with torch.no_grad():
        torch.testing.assert_close(layer(X_H), y)

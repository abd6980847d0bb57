"""Who is measured: the ways to compute a case, and what each is held to before it is timed.

"exact" is the paper's formula, "eccv24" what the published code computes, "lora" plain LoRA; a
yardstick computes less or more than the operation and is held to nothing.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import formulations
from bench.cases import Case
from bench.matmul_order import MIXED, matmul_order
from bench.models import WAYS
from bench.operands import S_SCALE, Operands
from bench.published import published
from bench.subject import Subject
from fused_route import coverage, known, ops, routed_linear
from fused_route.checks import MOST
from fused_route.plan import major_of

Make = Callable[[Operands], Subject]

MANY_ROWS = 8192  # of kernels/config.py, which needs Triton
LONG = 128  # rows of a sample, from which on its operand's gradient may go another way


@dataclass(frozen=True)
class Provider:
    """A way to compute an operation.

    Args:
        says: what it is, in a line.
        make: from operands to what is timed.
        held_to: "exact", "eccv24", "lora", or "" for a yardstick.
        compiles: needs a C++ compiler on the CPU, minutes for many cases anywhere.
    """

    says: str
    make: Make
    held_to: str = "exact"
    compiles: bool = False


def _way(function: Callable[[Operands], Tensor]) -> Make:
    return lambda o: o.subject(function)


def _compiled(function: Callable[[Operands], Tensor], **options: Any) -> Make:
    """torch.compile of a formulation; sizes are constants of what it makes."""
    return _way(torch.compile(function, dynamic=False, **options))


def _peft(o: Operands) -> Subject:
    """LoRA by PEFT on the whole base, without routing."""
    from peft.tuners.lora import Linear, LoraConfig

    assert o.weight is not None and o.bias is not None
    base = nn.Linear(o.weight.shape[1], o.weight.shape[0], device="meta")
    base.weight, base.bias = nn.Parameter(o.weight, False), nn.Parameter(o.bias, False)
    config = LoraConfig(
        r=o.r, lora_alpha=int(S_SCALE * o.r), lora_dropout=o.layer.dropout, init_lora_weights=False
    )
    layer = Linear(base, "default", config, r=o.r, lora_alpha=int(S_SCALE * o.r)).to(o.x)
    layer.lora_A["default"].weight = nn.Parameter(_plain_A(o))
    layer.lora_B["default"].weight = nn.Parameter(_plain_B(o))
    weights = {
        "A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight,
    }  # fmt: skip
    if o.layer.dropout > 0.0:
        layer.lora_dropout["default"] = nn.Dropout(o.layer.dropout)
    leaves = {"x": o.x, **weights}
    return Subject(lambda: layer(o.x), leaves, o.dy, live=[*o.inputs, *weights.values()])


def _plain_A(o: Operands) -> Tensor:
    """(r, d): PEFT cannot adapt segments, so a fused projection gets one of rank r."""
    return o.A.detach()[: o.r].clone()


def _plain_B(o: Operands) -> Tensor:
    """(of·d, r)."""
    rows = o.dy.shape[-1]
    return o.B.detach().repeat(2, 1)[:rows].clone()


def lora(o: Operands) -> Subject:
    """What PEFT is held to: y = x Wᵀ + b + s · x Aᵀ Bᵀ."""
    A, B = (t.requires_grad_() for t in (_plain_A(o), _plain_B(o)))

    def forward() -> Tensor:
        return formulations.frozen(o) + S_SCALE * F.linear(F.linear(o.x, A), B)

    return Subject(forward, {"x": o.x, "A": A, "B": B}, o.dy, live=o.inputs)


def _frozen(o: Operands) -> Subject:
    return Subject(partial(formulations.frozen, o), {"x": o.x}, o.dy, live=o.inputs)


def _p1(o: Operands) -> Tensor:
    """The kernels with the frozen base's product by torch, also where P3 was faster."""
    layer = o.layer
    return routed_linear(
        o.x, o.A, o.B, o.x_r, weight=o.weight, bias=o.bias, route=layer.route, s=S_SCALE,
        adapted=o.adapted, of=o.of, dropout=layer.dropout, recompute=layer.recompute,
        impl="triton", plan="p1",
    )  # fmt: skip


def _trial(entries: Callable[[], dict[str, Any]]) -> Make:
    """The kernels with other entries in `kernels.config`, by plans of its own."""

    def make(o: Operands) -> Subject:
        from bench.configured import configured

        def forward() -> Tensor:
            usual = ops._plan, known._KNOWN
            ops._plan, known._KNOWN = plans, calls  # 0.2 µs; mock.patch takes 3.5
            try:
                return formulations.library(o)
            finally:
                ops._plan, known._KNOWN = usual

        with configured(**entries()), torch.no_grad():
            plans, calls = ops._plan, known._KNOWN
            forward()  # plans hold what they were made with
        return o.subject(lambda _: forward())

    return make


def _along() -> dict[str, Any]:
    from bench.configured import along_with_few_rows

    return {"image": along_with_few_rows}


def _overlapped() -> dict[str, Any]:
    from bench.configured import wherever_it_can

    return {"overlaps": wherever_it_can}


def _serial() -> dict[str, Any]:
    return {"LONG_VECTORS": MOST, "LONG_MATRICES": MOST}


class _Copied(torch.autograd.Function):
    """x, and dy, each copied once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.clone()


def _copy(o: Operands) -> Subject:
    """One pass over memory forward, and one backward: a floor that has launches and ends."""
    return Subject(lambda: _Copied.apply(o.x), {"x": o.x}, o.dy, live=o.inputs)


def _full(o: Operands) -> Subject:
    """Fine-tuning the base itself: y, dx and dW."""
    assert o.weight is not None
    weight = o.weight.detach().clone().requires_grad_()

    def forward() -> Tensor:
        return F.linear(o.x, weight, o.bias)

    return Subject(forward, {"x": o.x, "W": weight}, o.dy, live=[*o.inputs, weight])


PROVIDERS: dict[str, Provider] = {
    "reference": Provider("the library's eager torch", _way(formulations.clean)),
    "published": Provider("the published formulation", _way(published), "eccv24"),
    "compile": Provider(
        "torch.compile of the reference", _compiled(formulations.clean), compiles=True
    ),
    "compile-folded": Provider(
        "torch.compile with s folded into z", _compiled(formulations.folded), compiles=True
    ),
    "max-autotune": Provider(
        "the same, mode max-autotune",
        _compiled(formulations.folded, mode="max-autotune-no-cudagraphs"), compiles=True,
    ),
    "matmul-order": Provider(
        "Unsloth's and axolotl's order of products, with routing", _way(matmul_order)
    ),
    "peft": Provider("plain LoRA by PEFT, no routing", _peft, "lora"),
    "fused": Provider("the library's kernels", _way(formulations.library)),
    "fused-p1": Provider("the kernels by plan P1 alone", _way(_p1)),
    "fused-along": Provider("the kernels without launches of the image's own", _trial(_along)),
    "fused-overlapped": Provider(
        "the kernels, each started before the one before it ends", _trial(_overlapped)
    ),
    "fused-serial": Provider("the kernels with long samples as short ones", _trial(_serial)),
    "frozen": Provider("the base alone: y and dx", _frozen, ""),
    "copy": Provider("x copied, and dy: one pass each", _copy, ""),
    "full": Provider("the base's full fine-tuning: y, dx and dW", _full, ""),
}  # fmt: skip


def obstacle(name: str, case: Case, device: torch.device) -> str | None:
    """Why a provider is left out of an operation, or None."""
    layer_has_base = case.host != "adapter"
    if name in ("peft", "fused-p1", "frozen", "full") and not layer_has_base:
        return "an adapter has no base"
    if name == "copy" and layer_has_base:
        return "a base takes more than a pass over memory"
    if name == "peft" and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    if name == "matmul-order" and (case.route not in MIXED or case.dropout > 0.0):
        return "written for five routes, without dropout"
    if name == "fused-along" and (case.S * case.T >= MANY_ROWS or case.dtype == "fp32"):
        return "with many rows, and in fp32, the image has launches of its own"
    if name == "fused-along" and (case.route == "none" or case.Nv > 1):
        return "one visual vector a sample is made along"
    if name == "fused-serial" and case.T < LONG:
        return f"samples of fewer than {LONG} rows go one way"
    pairs = case.Nv > 1 and case.route in ("add", "mul", "expand")
    if name in ("published", "matmul-order") and pairs:
        return "written for one visual token there"
    R = case.r * (2 if case.host == "qkv" else 1)
    if name.startswith("fused") and R > coverage.MAX_R:
        return f"R = {R} is more than {coverage.MAX_R}"
    if name.startswith("fused") and (why := coverage.device_obstacle(device)) is not None:
        return why
    if name == "fused-overlapped" and device.type == "cuda" and (major_of(device) or 0) < 9:
        return "kernels start early from compute capability 9 on"
    return None


def offered(case: Case, names: list[str], device: torch.device) -> list[str]:
    """The providers that have a case, as far as is known before it is made."""
    if case.kind == "op":
        return [name for name in names if obstacle(name, case, device) is None]
    lacking = {"fused"} if obstacle("fused", case, device) is not None else set()
    lacking |= {"peft"} if case.host == "adapter" else set()
    return [name for name in names if name in WAYS and name not in lacking]


def check_names(names: list[str]) -> list[str]:
    """The names, each a provider.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, got {name!r}")
    return names

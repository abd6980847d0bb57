"""Bad inputs of layers, contexts and projectors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_inputs import (
    Subject,
    bad,
    no_names,
    no_numbers,
    no_probabilities,
    no_tensors,
    no_truths,
    no_whole_numbers,
)
from torch import nn

from fused_route import (
    RoutedAdapter,
    RoutedLinear,
    RoutingContext,
    RoutingInput,
    VisualProjector,
    scale,
)

D, R = 8, 4
IMAGE = torch.ones(2, 5, D)

TEXT_MASKS = [
    bad("type", [1, 1], "(B, T)"),
    bad("name", "some", "'all'"),
    bad("empty", "", "'all'"),
    bad("bool", True, "(B, T)"),
    bad("shape", torch.ones(3), "(B, T)"),
    bad("shape", torch.ones(2, 3, 1), "(B, T)"),
]
FEATURES = [
    *no_tensors("x_r"),
    bad("dtype", IMAGE.long(), "floating-point"),
    bad("shape", IMAGE[0, 0], "(B, Nv, d)"),
    bad("shape", IMAGE[:, :0], "Nv ≥ 1"),
    bad("shape", IMAGE[..., :3], "visual_width=8", "width 3"),
    bad("conflict", RoutingInput(IMAGE, x_v=torch.ones(2, 5, R)), "give x_r", "x_v"),
    bad("conflict", RoutingInput(IMAGE, operand=scale(torch.ones(2, 1, 1, R))), "give x_r", "oper"),
]


def projecting() -> RoutingContext:
    context = RoutingContext(VisualProjector(D, {D, 4}))
    context.set(IMAGE, text_mask="all")
    return context


def entering(using: Callable[..., Any]) -> Callable[..., None]:
    """Of something for a `with`, a call that enters it."""

    def enter(**arguments: Any) -> None:
        with using(**arguments):
            pass

    enter.__self__ = using.__self__  # type: ignore[attr-defined]
    return enter


def setting(name: str, make: Callable[[], Callable[..., Any]]) -> Subject:
    """Something that takes a routing input, beside a projector from 8 columns."""
    rows = [
        row if row.value is not None else bad("none", None, "x_r", text_mask=None)
        for row in FEATURES
    ]
    return Subject(
        name,
        lambda _: (make(), {"x_r": IMAGE, "text_mask": "all"}),
        {"x_r": rows, "text_mask": TEXT_MASKS},
    )


CONTEXTS = [
    bad("type", torch.ones(2, D), "RoutingContext"),
    bad("text", "context", "RoutingContext"),
    bad("type", RoutingContext, "RoutingContext", "type"),
    bad("type", {}, "RoutingContext"),
]
DEVICES = [bad("name", "gpu7", "cpu"), bad("type", 1.5, "device"), bad("bool", True, "device")]
DTYPES = [
    bad("dtype", torch.int64, "floating-point"),
    bad("text", "float32", "dtype"),
    bad("type", 32, "dtype"),
]
LAYER: dict[str, list[Any]] = {
    "rank": no_whole_numbers(),
    "route": no_names("mul"),
    "dropout": no_probabilities(),
    "context": CONTEXTS,
    "device": DEVICES,
    "dtype": DTYPES,
    "recompute": no_truths(),
    "impl": no_names("reference"),
    "inner_rank": [
        *no_whole_numbers(optional=True),
        bad("conflict", 2, "takes no image", "inner_rank=2", route="none"),
    ],
    "routed_by": no_names("text"),
}

LINEAR = Subject(
    "RoutedLinear",
    lambda _: (RoutedLinear, {"base": nn.Linear(D, 6), "rank": R, "context": projecting()}),
    {
        **LAYER,
        "plan": no_names("p3"),
        "base": [
            bad("none", None, "callable"),
            bad("type", 3, "callable"),
            bad("text", "linear", "callable"),
            bad("type", torch.ones(D, D), "callable"),
            bad("shape", torch.relu, "in_features", "builtin_function"),
            bad("shape", nn.ReLU(), "in_features and out_features"),
        ],
        "alpha": no_numbers(optional=True),
        "adapted": [
            bad("none", None, "segments"),
            bad("empty", (), "distinct segments"),
            bad("range", (1,), "from 0 to 0"),
            bad("range", (-1,), "from 0 to 0"),
            bad("conflict", (1, 1), "distinct", of=2),
            bad("text", "0", "segments"),
            bad("type", 0, "segments"),
            bad("type", (0.0,), "segments"),
            bad("bool", (False,), "segments"),
        ],
        "of": [*no_whole_numbers(), bad("range", 4, "divide", "of=4")],
        "in_features": [
            bad("conflict", 9, "the base has 8", "9"),
            *(
                bad(row.kind, row.value, row.accepted, row.given, base=torch.relu, out_features=6)
                for row in no_whole_numbers(optional=True)
            ),
        ],
        "out_features": [
            bad("conflict", 9, "the base has 6", "9"),
            *(
                bad(row.kind, row.value, row.accepted, row.given, base=torch.relu, in_features=D)
                for row in no_whole_numbers(optional=True)
            ),
        ],
    },
)
ADAPTER = Subject(
    "RoutedAdapter",
    lambda _: (RoutedAdapter, {"d": D, "rank": R, "context": projecting()}),
    {
        **LAYER,
        "d": no_whole_numbers(),
        "activation": no_names("gelu"),
        "bias": no_truths(),
        "residual": no_truths(),
        "norm": no_names("before"),
    },
)


def running(make: Callable[..., nn.Module], *arguments: Any) -> Any:
    def made(_: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
        layer = make(*arguments)
        layer.context.set(IMAGE)  # type: ignore[union-attr,operator]
        return layer.forward, {"x_h": torch.ones(2, 3, D)}

    return made


STATES = [
    *no_tensors("x_h"),
    bad("shape", torch.ones(D), "x_h"),
    bad("shape", torch.ones(2, 3, 7), "8", "7"),
    bad("shape", torch.ones(3, 3, D), "batch of 2", "batch of 3"),
    bad("dtype", torch.ones(2, 3, D).half(), "float32", "float16"),
    bad("dtype", torch.ones(2, 3, D).long(), "floating-point", "int64"),
    bad("device", torch.ones(2, 3, D, device="meta"), "cpu", "meta"),
]

CONTEXT = [
    Subject(
        "RoutingContext",
        lambda _: (RoutingContext, {}),
        {
            "projector": [
                bad("type", nn.Linear(D, D), "VisualProjector"),
                bad("text", "projector", "VisualProjector"),
                bad("bool", True, "VisualProjector"),
                bad("type", VisualProjector, "VisualProjector", "type"),
            ]
        },
    ),
    setting("RoutingContext.set", lambda: projecting().set),
    setting("RoutingContext.using", lambda: entering(projecting().using)),
    Subject(
        "RoutingContext.get",
        lambda _: (projecting().get, {"width": D, "layer": "query"}),
        {
            "width": [
                bad("range", 5, "holds 8, 4", "5"),
                bad("range", -1, "holds 8, 4", "-1"),
                bad("none", None, "holds 8, 4"),
                bad("text", "8", "holds 8, 4"),
                bad("type", [8], "holds 8, 4"),
            ],
            "device": [bad("text", "cpu", "torch.device", "cpu"), bad("type", 0, "torch.device")],
        },
    ),
    Subject(
        "VisualProjector",
        lambda _: (VisualProjector, {"visual_width": 5, "widths": {D}}),
        {
            "visual_width": no_whole_numbers(),
            "widths": [
                bad("none", None, "widths"),
                bad("type", 8, "widths"),
                bad("text", "8", "widths"),
                bad("text", {"8"}, "whole number of at least 1", "'8'"),
                bad("range", {0}, "whole number of at least 1", "0"),
                bad("range", {-8}, "whole number of at least 1", "-8"),
                bad("type", {2.5}, "whole number of at least 1", "2.5"),
                bad("bool", {True}, "whole number of at least 1", "True"),
            ],
        },
    ),
    Subject(
        "VisualProjector.forward",
        lambda _: (VisualProjector(5, {D}).forward, {"x": torch.ones(2, 3, 5)}),
        {
            "x": [
                *no_tensors("(B, Nv, 5)"),
                bad("shape", torch.ones(2, 3, 4), "(B, Nv, 5)"),
                bad("dtype", torch.ones(2, 3, 5).long(), "floating-point"),
            ]
        },
    ),
]


SUBJECTS = [
    LINEAR,
    ADAPTER,
    Subject("RoutedLinear.forward", running(RoutedLinear, nn.Linear(D, D), R), {"x_h": STATES}),
    Subject("RoutedAdapter.forward", running(RoutedAdapter, D, R), {"x_h": STATES}),
    *CONTEXT,
]

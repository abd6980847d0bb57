"""Bad inputs of functions and values: routed_linear, routed_adapter, routes, routing inputs."""

from pathlib import Path
from typing import Any

import torch
from bad_inputs import (
    Bad,
    Subject,
    bad,
    no_names,
    no_numbers,
    no_probabilities,
    no_tensors,
    no_truths,
    no_whole_numbers,
)

from fused_route import (
    ROUTES,
    Dropout,
    Operand,
    Route,
    Routing,
    RoutingInput,
    masked_mean,
    matrix,
    rank1,
    routed_adapter,
    routed_linear,
    scale,
    shift,
)

D, R = 8, 4
X, IMAGE = torch.ones(2, 3, D), torch.ones(2, 5, D)
A, B, W, BIAS = torch.ones(R, D), torch.ones(D, R), torch.ones(D, D), torch.ones(D)
INTEGERS: dict[str, Any] = {"A": A.long(), "B": B.long(), "weight": W.long()}
PACKED = torch.tensor([0, 0, 0, 1, 1, -1])


def prepare(x_v: torch.Tensor) -> Operand:
    return scale(x_v)


NUMBER = Operand("shift", (3.0,))  # type: ignore[arg-type]
X_H = [
    *no_tensors(),
    bad("shape", X[0, 0], "(B, …, d)"),
    bad("shape", torch.ones(()), "(B, …, d)"),
    bad("shape", X[..., :7], "x_h has 7", "7"),
    bad("shape", X[:1], "x_r is for a batch of 2", "batch of 1"),
    bad("dtype", X.long(), "floating-point"),
    bad("dtype", X.bool(), "floating-point"),
    bad("dtype", X.to(torch.complex64), "floating-point"),
    bad("device", X.to("meta"), "x_h is on meta"),
]
X_R = [
    *no_tensors("x_r"),
    bad("dtype", IMAGE.long(), "floating-point"),
    bad("dtype", IMAGE.bool(), "floating-point"),
    bad("shape", IMAGE[0, 0], "(B, Nv, d)"),
    bad("shape", IMAGE[None], "(B, Nv, d)"),
    bad("shape", IMAGE[:, :0], "Nv ≥ 1"),
    bad("shape", IMAGE[..., :7], "x_h has 8", "width 7"),
    bad("shape", IMAGE[:1], "x_h is a batch of 2", "batch of 1"),
    bad("device", IMAGE.to("meta"), "x_h on cpu"),
    bad("shape", RoutingInput(IMAGE, None, PACKED[:4]), "x_h has 6", "4 rows", "sample_index"),
    bad("shape", RoutingInput(IMAGE, x_v=torch.ones(2, 5, 3)), "R = 4", "3", "x_v"),
    bad("dtype", RoutingInput(IMAGE, x_v=torch.ones(2, 5, R).half()), "convert", "16", "x_v"),
    bad("shape", RoutingInput(IMAGE, operand=scale(torch.ones(2, 1, 1, 3))), "(2, 1, 1, 4)",
        "(2, 1, 1, 3)", "mul"),
    bad("conflict", RoutingInput(IMAGE, None, PACKED), "transpose='exact'", "'eccv24'",
        "sample_index", route=Routing("gram", compat="eccv24")),
    bad("conflict", RoutingInput(IMAGE, torch.ones(2, 5).bool()), "transpose='exact'", "mask",
        "mask", route=Routing("gram", compat="eccv24")),
    bad("shape", IMAGE, "takes 1", "Nv = 5", route=Routing("mul", compat="eccv24")),
    bad("shape", IMAGE, "takes one", "Nv = 5", route="self_gram"),
]  # fmt: skip
DOWN = [
    *no_tensors("A must be"),
    bad("shape", A.T, "(R, d) with d = 8"),
    bad("shape", A[0], "(R, d) with d = 8"),
    bad("shape", A[:0], "positive"),
    bad("shape", A[..., :7], "d = 8"),
    bad("shape", A[None], "(R, d)"),
    bad("dtype", A.half(), "convert"),
    bad("dtype", A.long(), "convert"),
    bad("device", A.to("meta"), "x_h is on cpu"),
]
UP = [
    *no_tensors("B must be"),
    bad("shape", B.T, "(8, 4)"),
    bad("shape", B[0], "(8, 4)"),
    bad("shape", B[:0], "(8, 4)"),
    bad("shape", B[..., :3], "(8, 4)"),
    bad("dtype", B.double(), "convert"),
    bad("device", B.to("meta"), "x_h is on cpu"),
]
ROUTE = [
    *no_names("mul"),
    bad("type", {}, "mul"),
    bad("type", prepare, "mul", "function"),
    *(
        bad("type", Route("mine", answer), accepted, given, "'mine'")  # type: ignore[arg-type]
        for answer, accepted, given in (
            (lambda x_v: x_v, "matrix(K)", "Tensor"),
            (lambda x_v: None, "matrix(K)", "NoneType"),
            (lambda x_v: NUMBER, "tensor", "3.0"),
            (lambda x_v: scale(x_v[..., :2]), "(2, 1, 5, 4)", "(2, 1, 5, 2)"),
            (lambda x_v: scale(x_v[:1]), "(2, 1, 5, 4)", "(1, 1, 5, 4)"),
            (lambda x_v: matrix(x_v), "(2, 1, 4, 4)", "(2, 1, 5, 4)"),
            (lambda x_v: Operand("grum", (x_v,)), "scale", "grum"),  # type: ignore[arg-type]
        )
    ),
]


def vectors(length: int) -> list[Bad]:
    """No biases of this length."""
    return [
        *no_tensors("tensor", optional=True),
        bad("shape", torch.ones(length + 1), f"({length},)"),
        bad("shape", torch.ones(1, length), f"({length},)"),
        bad("shape", torch.ones(()), f"({length},)"),
        bad("dtype", torch.ones(length).half(), "convert"),
        bad("device", torch.ones(length, device="meta"), "x_h is on cpu"),
    ]


CALL: dict[str, list[Bad]] = {
    "route": ROUTE,
    "dropout": [
        *no_probabilities(),
        bad("shape", Dropout(0.5, torch.ones(2, 3, 7).bool(), None), "(2, 3, 8)", "(2, 3, 7)",
            "keep_h"),
        bad("shape", Dropout(0.5, None, torch.ones(2, 4, D).bool()), "(2, 5, 8)", "(2, 4, 8)",
            "keep_r"),
        bad("device", Dropout(0.5, torch.ones(2, 3, D, device="meta").bool(), None), "cpu", "meta",
            "keep_h"),
    ],
    "recompute": no_truths(),
    "impl": [*no_names("reference"), bad("name", "triton", "on a GPU", "cpu")],
}  # fmt: skip

LINEAR = Subject(
    "routed_linear",
    lambda _: (routed_linear, {"x_h": X, "A": A, "B": B, "x_r": IMAGE, "weight": W}),
    {
        "x_h": [*X_H, bad("dtype", X.long(), "floating-point", **INTEGERS)],
        "x_r": X_R,
        "A": [
            *DOWN,
            bad("shape", A[:3], "multiple of 2", B=torch.ones(8, 1), adapted=(0, 1), of=2),
        ],
        "B": UP,
        "weight": [
            bad("none", None, "exactly one of", "base_out"),
            *no_tensors("weight", optional=True),
            bad("shape", W[:, :7], "d = 8"),
            bad("shape", W[0], "(of·n, d)"),
            bad("shape", W[None], "(of·n, d)"),
            bad("dtype", W.double(), "convert"),
            bad("device", W.to("meta"), "x_h is on cpu"),
            bad("conflict", W, "exactly one of", "base_out", base_out=X),
        ],
        "bias": [*vectors(D), bad("conflict", BIAS, "base_out", "weight", weight=None, base_out=X)],
        "base_out": [
            bad(row.kind, row.value, row.accepted, row.given, row.named, weight=None)
            for row in [
                bad("none", None, "exactly one of", "weight"),
                *no_tensors("base_out", optional=True),
                bad("shape", X[:, :2], "(2, 3, 'of·n')"),
                bad("shape", X[0], "(2, 3, 'of·n')"),
                bad("shape", torch.ones(()), "of·n"),
                bad("shape", X[..., :7], "(7, 4)", "(8, 4)", "B"),
                bad("dtype", X.long(), "floating-point"),
                bad("device", X.to("meta"), "cpu"),
            ]
        ],
        "s": no_numbers(),
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
            bad("type", ([0],), "segments"),
            bad("not finite", (float("nan"),), "segments"),
            bad("huge", (10**30,), "segments"),
        ],
        "of": [*no_whole_numbers(), bad("range", 3, "divide", "of=3")],
        "plan": [
            *no_names("p3"),
            bad("conflict", "p3", "weight of a frozen base", weight=None, base_out=X),
            bad("conflict", "p3", "weight of a frozen base", weight=W.clone().requires_grad_()),
        ],
        **CALL,
    },
)
ADAPTER = Subject(
    "routed_adapter",
    lambda _: (routed_adapter, {"x_h": X, "A": A, "B": B, "x_r": IMAGE}),
    {
        "x_h": [*X_H, bad("dtype", X.long(), "floating-point", A=A.long(), B=B.long())],
        "x_r": X_R,
        "A": DOWN,
        "B": UP,
        "b_A": vectors(R),
        "b_B": vectors(D),
        "activation": no_names("gelu"),
        "residual": no_truths(),
        **CALL,
    },
)
DROPOUT = Subject(
    "Dropout",
    lambda _: (Dropout, {"p": 0.5, "keep_h": None, "keep_r": None}),
    {
        "p": no_probabilities(),
        **{
            keep: [
                *no_tensors("bool tensor", optional=True),
                bad("dtype", IMAGE, "bool tensor"),
                bad("dtype", IMAGE.to(torch.uint8), "bool tensor"),
            ]
            for keep in ("keep_h", "keep_r")
        },
    },
)
MEAN = Subject(
    "masked_mean",
    lambda _: (masked_mean, {"states": X}),
    {
        "states": [
            *no_tensors(),
            bad("shape", X[0], "(B, T, d)"),
            bad("shape", X[None], "(B, T, d)"),
            bad("dtype", X.long(), "floating-point"),
        ],
        "mask": [
            *no_tensors("(B, T)", optional=True),
            bad("dtype", torch.ones(2, 3), "bool or integer"),
            bad("shape", X[0, 0] > 0, "(2, 3)"),
            bad("shape", X > 0, "(2, 3)"),
            bad("shape", (X > 0)[:1, :, 0], "(2, 3)"),
            bad("device", (X > 0)[..., 0].to("meta"), "cpu", "meta"),
        ],
    },
)


def routing_input(_: Path) -> Any:
    return RoutingInput, {"x_r": IMAGE}


def indices(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


INPUT = Subject(
    "RoutingInput",
    routing_input,
    {
        "x_r": X_R[:10],
        "mask": [
            *no_tensors("tensor", optional=True),
            bad("dtype", torch.ones(2, 5), "bool (B, Nv)"),
            bad("dtype", torch.ones(2, 5).long(), "bool (B, Nv)"),
            bad("shape", torch.ones(2, 4).bool(), "(2, 5)"),
            bad("shape", torch.ones(1, 5).bool(), "(2, 5)"),
            bad("shape", torch.ones(5).bool(), "(2, 5)"),
            bad("shape", torch.ones(2, 5, 1).bool(), "(2, 5)"),
            bad("device", torch.ones(2, 5, device="meta").bool(), "cpu", "meta"),
        ],
        "sample_index": [
            *no_tensors("tensor", optional=True),
            bad("range", indices(1, 0), "non-decreasing", "from 0 to 1"),
            bad("range", indices(0, 2), "B − 1 = 1", "0 to 2"),
            bad("range", indices(-2, 0), "−1 for padding", "-2"),
            bad("range", indices(1, -1, 0), "non-decreasing", "-1 to 1"),
            bad("huge", indices(0, 2**62), "B − 1 = 1", str(2**62)),
            bad("shape", indices(0)[None], "(M,)"),
            bad("shape", torch.tensor(0), "(M,)"),
            bad("dtype", torch.zeros(2), "integers"),
            bad("dtype", torch.zeros(2).bool(), "integers"),
            bad("dtype", torch.zeros(2, dtype=torch.uint8), "integers"),
            bad("empty", indices(0, 0), "no samples", "2 rows", x_r=torch.ones(0, D)),
            bad("device", indices(0, 1).to("meta"), "cpu", "meta"),
        ],
        "x_v": [
            *no_tensors("tensor", optional=True),
            bad("shape", torch.ones(2, R), "(B, Nv, R)"),
            bad("shape", torch.ones(2, 4, R), "(2, 5)"),
            bad("shape", torch.ones(1, 5, R), "(2, 5)"),
            bad("dtype", torch.ones(2, 5, R).long(), "floating-point"),
        ],
        "operand": [
            bad("type", torch.ones(2, 1, 1, R), "scale(w)"),
            bad("text", "scale", "scale(w)", "str"),
            bad("type", [], "scale(w)"),
            bad("type", ("scale", (torch.ones(1),)), "scale(w)", "tuple"),
            bad("name", Operand("grum", ()), "scale", "grum"),  # type: ignore[arg-type]
        ],
    },
)
REPEATED = Subject(
    "RoutingInput.repeated",
    lambda _: (RoutingInput(IMAGE).repeated, {"beams": 2}),
    {"beams": no_whole_numbers()},
)
OF = Subject(
    "RoutingInput.of",
    lambda _: (RoutingInput(IMAGE).of, {"x_r": IMAGE[..., :3]}),
    {
        "x_r": [
            *no_tensors("x_r"),
            bad("shape", IMAGE[:, :4], "(2, 5)"),
            bad("shape", IMAGE[:1], "(2, 5)"),
            bad("shape", IMAGE[:, 0], "(2, 5)"),
            bad("dtype", IMAGE.long(), "floating-point"),
        ]
    },
)

SUBJECTS = [LINEAR, ADAPTER, DROPOUT, MEAN, INPUT, REPEATED, OF]

VECTOR = torch.ones(2, 1, 1, R)
for make_operand, arguments in ((shift, ("w",)), (scale, ("w",)), (rank1, "uw"), (matrix, ("K",))):
    valid = {name: VECTOR for name in arguments}
    SUBJECTS.append(
        Subject(
            make_operand.__name__,
            lambda _, call=make_operand, valid=valid: (call, valid),  # type: ignore[misc]
            {name: no_tensors() for name in arguments},
        )
    )

SUBJECTS += [
    Subject(
        "Route",
        lambda _: (Route, {"name": "mine", "prepare": prepare}),
        {
            "name": [
                bad("none", None, "identifier"),
                bad("empty", "", "identifier"),
                bad("name", "my route", "identifier"),
                bad("name", "1st", "identifier"),
                bad("name", "a-b", "identifier"),
                bad("name", "../up", "identifier"),
                bad("type", 3, "identifier"),
                bad("type", ["mine"], "identifier"),
            ],
            "prepare": [
                bad("none", None, "callable"),
                bad("text", "scale", "callable"),
                bad("type", torch.ones(1), "callable"),
            ],
            "takes": no_names("tokens"),
            "first": no_names("relu"),
            "published": [bad("text", "scale", "callable"), bad("type", 3, "callable")],
            "scores": no_names("image"),
        },
    ),
    Subject(
        "RouteTable.register",
        lambda _: (ROUTES.register, {"route": Route("mine", prepare)}),
        {
            "route": [
                bad("none", None, "Route"),
                bad("text", "mul", "Route"),
                bad("type", prepare, "Route"),
                bad("type", Routing("mul"), "Route"),
                *(
                    bad("conflict", Route(name, prepare), "built-in", repr(name), "name")
                    for name in ("none", "mul", "gram")
                ),
            ]
        },
    ),
    Subject(
        "Routing",
        lambda _: (Routing, {}),
        {
            "route": [*no_names("mul"), bad("type", Routing("mul"), "mul")],
            "transpose": [
                *no_names("exact"),
                bad("conflict", "eccv24", "exact", route=Route("mine", prepare)),
            ],
            "segments": no_names("joint"),
            "pool": [*no_names("first"), bad("conflict", "first", "exact", transpose="eccv24")],
            "normalize": no_names("unit"),
            "compat": no_names("eccv24", optional=True),
        },
    ),
]

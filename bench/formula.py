"""Bytes and FLOPs of an operation by formula, the roofline floor, and times that follow: modelled.

X and Y are the bytes of x and of the adapted columns of y, H those of x_t, as in kernels/README.md,
whose counts `make test` holds the kernels to. Small terms (an image of one visual token, partial
sums, biases) are left out.
"""

from typing import NamedTuple

from bench.cases import Case

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# An H100's, as one was measured: a copy between its own buffers, a bf16 product of 8192³.
H100 = {"copy": 3.0e12, "matmul": 0.8e15}


class Sizes(NamedTuple):
    """Bytes of the tensors of an operation."""

    X: float  # x
    Y: float  # adapted columns of y
    Y_all: float  # y
    H: float  # x_t
    W: float  # weight of the base; 0 for an adapter
    A: float
    B: float
    K: float  # the operand, where it is a matrix for each sample
    X_r: float  # x_r and x_v, where there are several visual tokens
    X_v: float


def sizes(case: Case) -> Sizes:
    """Of an operation."""
    e, g = BYTES[case.dtype], 2 if case.host == "qkv" else 1
    X = e * case.M * case.d
    of = 3 if case.host == "qkv" else 1
    W = 0 if case.host == "adapter" else e * of * case.d * case.d
    is_matrix = case.Nv > 1 and case.route in ("gram", "gram_relu")
    K = e * case.S * g * case.r * case.r if is_matrix else 0
    AB = e * g * case.r * case.d
    visual = e * case.S * case.Nv if case.Nv > 1 and case.route != "none" else 0
    X_r, X_v = visual * case.d, visual * g * case.r
    return Sizes(X, g * X, of * X, e * case.M * g * case.r, W, AB, AB, K, X_r, X_v)


def flops(case: Case, which: str) -> float:
    """Of the products of a pass; "both" is their sum. Routing is left out, but for a matrix.

    For that all visual tokens are projected, and have a part of dA; other routes may pool first.
    """
    if which == "both":
        return flops(case, "forward") + flops(case, "backward")
    g, of = (2, 3) if case.host == "qkv" else (1, 1)
    base = 0 if case.host == "adapter" else 2 * case.M * case.d * of * case.d
    narrow = 4 * case.M * case.d * g * case.r
    mixing = 2 * case.M * g * case.r * case.r if sizes(case).K else 0
    visual = 2 * case.S * case.Nv * case.d * g * case.r if sizes(case).K else 0
    return base + visual + (narrow + mixing) * (1 if which == "forward" else 2)


def least_bytes(case: Case, which: str) -> float:
    """What any implementation moves: every input read once, every output written once."""
    if which == "both":
        return least_bytes(case, "forward") + least_bytes(case, "backward")
    z = sizes(case)
    if which == "forward":
        return z.X + z.Y_all + z.W + z.A + z.B + z.X_r
    return 2 * z.X + z.Y_all + z.W + 2 * (z.A + z.B) + z.X_r


def floor_seconds(case: Case, which: str, copy: float, matmul: float) -> float:
    """The roofline floor of an operation's pass, with ceilings in bytes/s and FLOP/s."""
    if which == "both":
        return sum(floor_seconds(case, half, copy, matmul) for half in ("forward", "backward"))
    return max(least_bytes(case, which) / copy, flops(case, which) / matmul)


class Launch(NamedTuple):
    """A kernel of the fused operation: its bytes and FLOPs."""

    name: str
    which: str
    bytes: float
    flops: float


def launches(case: Case) -> list[Launch]:
    """The kernels of the fused operation, every gradient but that of x_r wanted."""
    z, M, d = sizes(case), case.M, case.d
    R = case.r * (2 if case.host == "qkv" else 1)
    down = up = 2 * M * d * R
    base = 2 * M * d * d * (3 if case.host == "qkv" else 1)
    mixing = 2 * M * R * case.r if z.K else 0
    K1, K2, AB = 2 * z.X + z.H, 2 * z.X + 3 * z.H, z.A + z.B
    dz = z.H if z.K else 0
    found = _of_visual_tokens(case)
    if z.W:
        K1, K2 = z.X + 2 * z.Y + z.H, z.Y + 2 * z.X + 3 * z.H
        found.append(Launch("base", "forward", z.X + z.Y_all + z.W, base))
        found.append(Launch("base's dx", "backward", z.X + z.Y_all + z.W, base))
    found.append(Launch("K1", "forward", K1 + z.K + AB, down + up + mixing))
    found.append(Launch("K2", "backward", K2 + z.K + dz + AB, down + up + 2 * mixing))
    if z.K:
        found.append(Launch("dK", "backward", 2 * z.H + z.K, mixing))
    found.append(Launch("K3", "backward", z.X + z.Y + 2 * z.H + AB, down + up))
    return found


def _of_visual_tokens(case: Case) -> list[Launch]:
    """What several visual tokens take besides: x_v, K of it, and on the way back the same."""
    z = sizes(case)
    R = case.r * (2 if case.host == "qkv" else 1)
    project, square = (2 * case.S * case.Nv * R * n for n in (case.d, case.r))
    found = []
    if z.X_r:
        found.append(Launch("x_v", "forward", z.X_r + z.A + z.X_v, project))
        found.append(Launch("dA of x_r", "backward", z.X_r + z.X_v + z.A, project))
    if z.K:
        found.append(Launch("K", "forward", z.X_v + z.K, square))
        found.append(Launch("dx_v", "backward", z.K + 2 * z.X_v, square))
    return found


def moved(case: Case, provider: str) -> dict[str, float] | None:
    """Bytes by pass that a provider moves by formula; None where there is none.

    The reference's total is that of its operations, each tensor read or written once by each:
    13X + 20H (adapter), 8X + 12Y + 14H + 2W (linear), with `mul` of one visual token, no dropout.
    """
    if case.kind != "op":
        return None
    if provider == "fused":
        by_pass = {"forward": 0.0, "backward": 0.0}
        for launch in launches(case):
            by_pass[launch.which] += launch.bytes
        return {**by_pass, "both": sum(by_pass.values())}
    z = sizes(case)
    is_plain = case.route == "mul" and case.Nv == 1 and not case.dropout
    if provider != "reference" or not is_plain or case.host == "qkv":
        return None
    if case.host == "adapter":
        return {"both": 13 * z.X + 20 * z.H}
    return {"both": 8 * z.X + 12 * z.Y + 14 * z.H + 2 * z.W}


def modelled_seconds(case: Case, which: str, ceilings: dict[str, float] = H100) -> float:
    """A *modelled* time of the fused operation: each kernel at its nearer ceiling, one by one."""
    return sum(
        max(launch.bytes / ceilings["copy"], launch.flops / ceilings["matmul"])
        for launch in launches(case)
        if which in ("both", launch.which)
    )

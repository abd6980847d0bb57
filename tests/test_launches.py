"""What a call launches and keeps for its backward, beside what eager torch does for the same."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bench.configured import along_with_few_rows, configured
from bench.offline.launches import LAYERS, R, S, T, cost

pytestmark = pytest.mark.interpret

H, VECTOR, SEED = 2 * S * T * R, 2 * S * R, 8  # bytes of x_t, of x_v, of dropout's seed
MATRIX = 2 * S * R * R + 3 * VECTOR  # K, and the x_v of three tokens that torch made it of

# Kernels and aten operations (forward, backward), and bytes kept, without dropout. Eager keeps
# x_t, x_v, z and, for an adapter, gelu(z).
EXPECTED = {
    "adapter": ((2, 4), H + VECTOR, (6, 15), 3 * H + VECTOR),
    "adapter, x_r trained": ((2, 4), H + VECTOR, (6, 16), 3 * H + VECTOR),
    "adapter, recompute": ((2, 5), VECTOR, (6, 15), 3 * H + VECTOR),
    "adapter, 3 visual tokens": ((3, 11), H + MATRIX, (7, 17), 3 * H + MATRIX),
    "linear": ((3, 5), H + VECTOR, (7, 12), 2 * H + VECTOR),
    "linear, x_r trained": ((3, 5), H + VECTOR, (7, 13), 2 * H + VECTOR),
    "linear, recompute": ((3, 6), VECTOR, (7, 12), 2 * H + VECTOR),
    "linear, 3 visual tokens": ((4, 10), H + MATRIX, (8, 14), 2 * H + MATRIX),
    "linear, base given": ((3, 6), H + VECTOR, (7, 12), 2 * H + VECTOR),
    "qkv, 2 of 3": ((3, 5), 2 * (H + VECTOR), (11, 18), 2 * (2 * H + VECTOR)),
    "qkv, 2 of 3, base given": ((4, 6), 2 * (H + VECTOR), (11, 18), 2 * (2 * H + VECTOR)),
}
# P3 launches the product in another order, and keeps what P1 does.
EXPECTED |= {name: EXPECTED[name.replace(", P3", "")] for name in LAYERS if "P3" in name}


@pytest.fixture
def poisoned() -> None:
    """Not here: filling new memory would count."""


@pytest.mark.parametrize("name", LAYERS)
def test_launches_and_saved_bytes(name: str) -> None:
    ours, eager = cost(LAYERS[name], "ours"), cost(LAYERS[name], "eager")
    print(name, *ours, *eager, sep="\n  ")
    assert (ours.launches, ours.saved, eager.launches, eager.saved) == EXPECTED[name]


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_one_launch_and_a_seed(name: str) -> None:
    (forward, backward), saved, (eager_forward, _), eager_saved = EXPECTED[name]
    ours, eager = (cost(replace(LAYERS[name], dropout=0.1), by) for by in ("ours", "eager"))
    print(name, *ours, *eager, sep="\n  ")
    if "visual tokens" in name:  # torch makes x_v, saves the mask of x_r, divides dA by 1 − p
        assert ours.launches[1] == backward + 1 and ours.saved < eager.saved
        return
    assert ours.launches == (forward + 1, backward) and ours.saved == saved + SEED
    assert eager.launches[0] == eager_forward + 2 and eager.saved > eager_saved


@pytest.mark.parametrize("name", ["adapter", "linear", "qkv, 2 of 3"])
def test_modules_launch_what_functions_do(name: str) -> None:
    assert cost(LAYERS[name], "module")[:2] == cost(LAYERS[name], "ours")[:2]


@pytest.mark.parametrize("name", [name for name in LAYERS if "visual tokens" not in name])
def test_an_image_made_along_saves_two_launches(name: str) -> None:
    """K1 makes x_v and K3 sums up its gradient; P3's own kernels leave K0 where it is."""
    (forward, backward), saved, _, _ = EXPECTED[name]
    with configured(image=along_with_few_rows):
        ours = cost(LAYERS[name], "ours")
    before = 0 if "P3" in name else 1
    assert ours.launches == (forward - before, backward - 1) and ours.saved == saved

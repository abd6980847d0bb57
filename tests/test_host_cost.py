"""What a call costs the host beside eager torch, and what the first call has to compile."""

from functools import partial
from itertools import product

import pytest
import torch

pytest.importorskip("triton")


from bench.offline import first_call, host_cost
from bench.offline.null_driver import use_null_driver

pytestmark = pytest.mark.compile

TRIES = 3  # other processes disturb any one of them
# At most these shares of eager torch's time. All are to be 0.6, and not all are: torch's C++ gains
# more from a faster CPU than the Python of a launch. Of the shortest chain by hand an adapter took
# 0.58 on one machine and 0.75 on another (its module 0.80), a linear layer, whose base is one of
# the chain's seven calls, 0.97 and 0.98 (1.02 and 1.07; 1.10 while others use the machine). Of the
# library's eager torch its module takes 0.65 to 0.72, by day. What holds is bounded, so that it
# gets no worse.
LIMITS = {
    ("adapter", "reference"): 0.6, ("adapter", "by hand"): 0.85,
    ("linear", "reference"): 0.75, ("linear", "by hand"): 1.15,
    ("linear, P3", "reference"): 0.75, ("linear, P3", "by hand"): 1.15,
}  # fmt: skip
# The forward and the backward product of P3 are one kernel.
KERNELS = {"adapter": 6, "linear": 6, "linear, P3": 7}


@pytest.fixture(autouse=True, scope="module")
def driver() -> None:
    use_null_driver()


@pytest.mark.parametrize("host", host_cost.HOSTS)
def test_passes_cost_less_than_eager_torch(host: str) -> None:
    limits = {baseline: limit for (of, baseline), limit in LIMITS.items() if of == host}
    shares = dict.fromkeys(product(("ours", "module"), limits), 2.0)
    for _ in range(TRIES):
        times = host_cost.passes(host)
        print(host, times)
        for way, baseline in shares:
            share = times[way] / times[baseline]
            shares[way, baseline] = min(shares[way, baseline], share)
        if all(share <= limits[baseline] for (_, baseline), share in shares.items()):
            break
    over = {pair: share for pair, share in shares.items() if share > limits[pair[1]]}
    assert not over


@pytest.mark.parametrize("host", host_cost.HOSTS)
def test_launches_cost_less_than_tritons_own(host: str) -> None:
    shares = {"": 1.0}
    for _ in range(TRIES):
        shares = {kernel: ours / anew for kernel, (ours, anew) in host_cost.launches(host).items()}
        print(host, shares)
        if max(shares.values()) <= host_cost.LAUNCH_LIMIT:
            break
    assert max(shares.values()) <= host_cost.LAUNCH_LIMIT, shares
    assert len(shares) == KERNELS[host]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_compiles_few_kernels(dropout: float) -> None:
    model = first_call.Model(32, torch.bfloat16, dropout)
    few, many, others = (
        first_call.compiled(partial(first_call.train, model, shapes))
        for shapes in ((first_call.FEW,), (first_call.MANY,), first_call.OTHERS)
    )
    # K0, K1, K2, operand gradients, K3 and K4 for two kinds of layers. Few and many rows share K0
    # of the image, K4, and K3, whose tile at R = 16 and 32 is one.
    assert (len(few), len(many), len(few & many)) == (12, 12, 6)
    assert others == few | many


def test_evaluation_and_frozen_inputs_compile_few_more() -> None:
    model = first_call.Model(32, torch.bfloat16, 0.1)
    few = (first_call.FEW,)
    trained = first_call.compiled(partial(first_call.train, model, few))
    below_frozen = first_call.compiled(partial(first_call.train, model, few, trains_below=False))
    evaluated = first_call.compiled(partial(first_call.evaluate, model, few))
    assert len(below_frozen - trained) == 1  # K2 of the first layer
    assert len(evaluated - trained) == 4  # K0 and K1 without dropout, K1 without x_t

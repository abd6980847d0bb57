"""Several processes: DistributedDataParallel, FSDP2, accelerate; nn.DataParallel is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

peft = pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("accelerate")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import two_processes  # noqa: E402
from vlm_models import drawn  # noqa: E402

from fused_route.training.cross_attention import CrossAttentionLinear  # noqa: E402

TESTS = Path(__file__).parent


def launched(*command: str | Path) -> str:
    """Output of a Python program run with the tests' modules at hand."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have written."""
    out = tmp_path_factory.mktemp("two")
    launched(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        TESTS / "two_processes.py", out,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("way", two_processes.WAYS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one_with_the_joint_batch(two: Path, kind: str, way: str) -> None:
    found = torch.load(two / f"{kind}.pt")[way]
    model = drawn(two_processes.WAYS[way]()).train()
    two_processes.loss(model, slice(None)).backward()
    expected = two_processes.gradients(model)
    assert found.keys() == expected.keys() and len(found) >= 6
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_parts_of_a_layer_are_not_to_be_sharded(two: Path) -> None:
    said = json.loads((two / "errors.json").read_text())
    assert "c_attn: A is a shard" in said and "fully_shard(block)" in said


def test_accelerate_launch_trains_as_one_process(tmp_path: Path) -> None:
    script = TESTS / "trainer_script.py"
    together = launched(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        script, tmp_path / "two", "2",
    )  # fmt: skip
    alone = launched(script, tmp_path / "one", "4")
    assert "2 processes" in together and "1 processes" in alone
    file = Path("checkpoint-4", "adapter_model.safetensors")
    found, expected = (load_file(tmp_path / name / file) for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("way", two_processes.WAYS)
def test_data_parallel_is_refused(way: str) -> None:
    model: Any = two_processes.WAYS[way]()
    with pytest.raises(ValueError, match=r"nn.DataParallel is not supported .*torchrun"):
        for module in model.modules():  # as torch.nn.parallel.replicate does
            module._replicate_for_data_parallel()


def test_data_parallel_is_refused_by_the_baseline_too() -> None:
    layer = CrossAttentionLinear(nn.Linear(4, 4), 2, 2, heads=1)
    with pytest.raises(ValueError, match=r"nn.DataParallel is not supported"):
        layer._replicate_for_data_parallel()

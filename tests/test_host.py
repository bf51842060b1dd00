"""The kernels' host side without a GPU: Triton's launch code runs up to the driver's call, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
from conftest import BENCHMARKS

COMPILED = """
import torch
from torch._dynamo.backends.common import aot_autograd
from functorch.compile import make_boxed_func

from crate_fast import CRATE
from host import SIZES, launched_to_nowhere

graphs = []

def compiler(graph, inputs):
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    graphs.append([name.split(".")[1] for name in called if name.startswith("crate_fast.")])
    return make_boxed_func(graph)

with launched_to_nowhere():
    for training in (True, False):
        model = CRATE(**SIZES, depth=2, backend="triton").train(training)
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler), dynamic=False)
        with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = compiled(torch.randn(1, 3, 8, 8))
        if training:
            logits.sum().backward()
layers = ["layer_forward"] * 2
assert graphs[0] == ["prepare_weights", "enter_forward", *layers], graphs
assert graphs[1] == ["leave_backward", *["layer_backward"] * 2], graphs
assert graphs[2] == ["prepare_weights", "enter_forward", *layers], graphs
"""

WAITING = """
import torch

from crate_fast import CRATE
from host import SIZES, launched_to_nowhere
from torch.utils._python_dispatch import TorchDispatchMode

class Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "item")
        return function(*arguments, **(options or {}))

with launched_to_nowhere(), torch.autocast("cpu", dtype=torch.bfloat16):
    model = CRATE(**SIZES, depth=3, backend="triton")
    images = torch.randn(2, 3, 8, 8)
    with Waits() as waits:
        torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1])).backward()
        with torch.inference_mode():
            model.eval()(images)
    assert waits.count == 0, waits.count
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("program", [COMPILED, WAITING], ids=["compiles whole", "waits for nothing"])
def test_fused_models(program):
    result = run("-c", program)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_hosts_time_is_measured_without_a_gpu(tmp_path):
    result = run(str(BENCHMARKS / "run.py"), "--suite", "host", "--out", str(tmp_path / "host.json"))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "host.json").read_text())
    assert written["machine"]["triton"] and written["rows"]["crate_fast, training"]["step"] > 0
    lines = [line.rsplit(maxsplit=3) for line in result.stdout.splitlines()[2:]]
    assert {name for name, *_ in lines} == {
        f"{a}, {b}" for a in ("crate_fast", "published") for b in ("training", "evaluation")
    }
    for name, forward, backward, step in lines:
        assert float(forward) > 10
        assert float(step) > 12 * float(forward) / 2
        assert (float(backward) > 10) == name.endswith("training")

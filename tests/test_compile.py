"""Compiled code of every kernel, without a GPU: no unexplained spills, shared memory that exists, matrix instructions."""

import json
import os
import subprocess
import sys

import pytest
from conftest import BENCHMARKS


def compile_table(path, *flags: str) -> tuple[int, list[dict]]:
    command = [sys.executable, BENCHMARKS / "compile.py", "--json", path, *flags]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert path.exists(), result.stderr
    return result.returncode, json.loads(path.read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [  # of what else has these products with other ends, CRATE-MAE's decoder and CRATE-α's step, float16 alone
        ["--arch", "sm_90", "--skip", "decoder", "odl"],
        ["--arch", "sm_90", "--kernel", "fp16 decoder", "fp16 odl,"],
        ["--arch", "sm_80", "sm_100", "--kernel", "fp16,", "fp16 width 48"],
    ],
    ids=["layers on sm_90", "others on sm_90", "float16 on sm_80 and sm_100"],
)
def test_every_kernel_compiles_without_spills_and_with_matrix_instructions(tmp_path, flags):
    status, rows = compile_table(tmp_path / "rows.json", *flags)
    assert [row for row in rows if row["problem"]] == []
    assert status == 0
    others = {"_data_gradient_kernel", "_weight_gradient_kernel"}
    expected = others if "fp16 odl," in flags else others | {"_mssa_forward_kernel", "_mssa_backward_kernel"}
    assert {"_linear_kernel"} | expected <= {row["kernel"] for row in rows}
    assert {row["precision"] for row in rows} <= {"", "ieee"}

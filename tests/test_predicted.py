"""The predicted step: instructions, bytes and flops counted exactly where they are known, and the committed step held."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from conftest import BENCHMARKS

from prediction import constants, report
from prediction.copies import Copy, Moved
from prediction.machine_code import Code, Instruction, Step
from prediction.pipes import Kernel, kernel_of, resident, work
from prediction.replay import clocks_of_program

COMMITTED = json.loads((BENCHMARKS / "results" / "predicted.json").read_text())


def run(script: Path, *flags) -> subprocess.CompletedProcess:
    """A script that compiles, which the interpreter of the other tests cannot."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, script, *flags], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def counted():
    return json.loads(run(Path(__file__).with_name("helpers") / "counted_kernels.py").stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["product", "described", "self described"])
def test_a_loop_of_loads_and_a_product_is_counted_exactly(counted, name):
    """Tiles of 128 × 64 of both operands in each of 5 turns, a tile of 128 × 128 written, all 16 bit; arguments in tuples,
    tensor descriptors made on the host and in the kernel."""
    found = counted[name]
    assert found["weights"] == [1.0]
    assert found["turns"] == [[5]]
    assert found["flops"] == 2 * 128 * 128 * 320
    assert found["executed"][0]["HGMMA"] == 5 * 64 // 16 * 128 // 64  # of a warp: 16 columns a time, 64 rows each
    moved = 5 * 2 * 128 * 64 * 2 + 128 * 128 * 2
    descriptors = 3 * 512 if name == "self described" else 0  # written by one warp, 128 bytes each, counted for all four
    assert found["bytes"] == moved + descriptors
    assert found["serialised"] == []


@pytest.mark.slow
def test_programs_go_their_own_ways(counted):
    """A quarter of them takes the branch, with 2 turns and 2 exponentials, the others 5 turns of another loop."""
    found = counted["branched"]
    long, short = sorted(
        zip(found["weights"], found["turns"], found["executed"], strict=True), reverse=True, key=lambda x: x[0]
    )
    assert long[:2] == (0.75, [0, 5])
    assert short[:2] == (0.25, [0, 2])
    assert (long[2]["LDG"], long[2].get("MUFU", 0)) == (5, 0)
    assert (short[2]["LDG"], short[2]["MUFU"]) == (2, 2)


@pytest.mark.slow
def test_a_bound_that_memory_holds_is_an_error_that_names_its_line(counted):
    path = Path(__file__).with_name("helpers") / "counted_kernels.py"
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "range(0, tl.load(p_count))" in text)
    assert f"{path.name}:{line}" in counted["blind"]["error"]  # Triton's cache may have it from a checkout elsewhere


@pytest.mark.slow
def test_a_sum_in_the_loop_of_a_product_is_found_out(counted):
    """It costs barriers and makes the assembler serialise the products: compile.py fails on both."""
    found = counted["sum in the loop"]
    assert found["barriers"] > 4 or found["serialised"]
    assert counted["product"]["barriers"] <= 4


@pytest.mark.slow
def test_the_quick_compilation_has_every_kernel_that_a_step_launches(counted):
    """`compile.py --quick` passes over none of them."""
    launched = {row["kernel"] for row in COMMITTED["rows"]}
    assert {"mssa_forward", "mssa_backward"} <= launched
    names = " ".join(counted["quick"])
    assert all(part in names for part in ("mssa_forward", "mssa_backward", "linear", "data_gradient", "weight_gradient"))


# --- the replay, on code made up here ---


def instruction(name: str, arguments: str = "", *, stall: int = 1, write: int = 7, wait: int = 0) -> Instruction:
    return Instruction("", name, arguments, stall, write, 7, wait, ())


def straight(instructions: list[Instruction], warps: int = 4, copies: dict | None = None, loads: dict | None = None) -> Kernel:
    """A kernel that executes `instructions` one after the other."""
    code = Code(instructions, {}, 128, 0, warps, 0)
    steps = [Step(n, True) for n in range(len(instructions))]
    return kernel_of(code, [(1.0, steps)], Moved(copies or {}, loads or {}))


def test_instructions_that_wait_for_nothing_take_a_slot_each():
    kernel = straight([instruction("FADD")] * 2000)
    assert clocks_of_program(kernel, 2) == pytest.approx(2000, rel=0.01)
    assert work(kernel, 3).clocks["issue"] == 2000 * 4 * 3


def test_products_take_the_matrix_unit_as_long_as_they_are_wide():
    product = instruction("HGMMA.64x128x16.F32", "R24, gdesc[UR4], R24, gsb0")
    kernel = straight([product] * 500)
    assert clocks_of_program(kernel, 2) == pytest.approx(500 * 64, rel=0.01)
    assert work(kernel, 1).flops == 500 * 2 * 64 * 128 * 16


def test_more_programs_hide_what_loads_take():
    """A load of 500 clocks and what waits for it, over and over: one program waits, eight wait together."""
    pair = [instruction("LDG.E.128", "R4, [R2.64]", write=0), instruction("FADD", wait=1)]
    kernel = straight(pair * 100)
    alone, together = clocks_of_program(kernel, 1), clocks_of_program(kernel, 8)
    assert alone > 100 * 500
    assert together < alone / 6
    assert together >= 100 * 4 * 512 / 64  # 64 bytes a clock into a multiprocessor, and four warps of 512


def test_a_barrier_waits_for_the_last_warp():
    """Two warps of a scheduler: after every barrier both have 24 clocks to wait, whatever they did before it."""
    kernel = straight([instruction("FADD"), instruction("BAR.SYNC")] * 200, warps=8)
    assert clocks_of_program(kernel, 1) >= 200 * 24


def test_a_box_is_moved_once_for_all_warps():
    box = instruction("UTMALDG.2D")
    kernel = straight([box] * 10, warps=4, copies={(): Copy(10 * 16384.0, 0)})
    assert work(kernel, 7).l2_bytes == 7 * 10 * 16384


def test_a_tile_that_is_loaded_in_small_pieces_is_moved_whole():
    """Eight lanes of a narrow load have an address of their own, as in a vector over rows, unless a tile needs more of them."""
    loads = [instruction("LDG.E.64", "R4, [R2.64]")] * 4
    assert work(straight(loads), 1).l2_bytes == 4 * 4 * 8 * 8
    assert work(straight(loads, loads={(): 4096.0}), 1).l2_bytes == 4096
    assert work(straight([instruction("LDG.E.128", "R4, [R2.64]")]), 1).l2_bytes == 4 * 512


def test_programs_that_fit_a_multiprocessor():
    code = Code([], {}, 128, 0, 4, 0)
    assert resident(code) == 4
    assert resident(code._replace(registers=129)) == 3
    assert resident(code._replace(shared=100 * 1024)) == 2
    assert resident(code._replace(shared=100 * 1024), "sm_80") == 1


# --- the committed prediction ---


@pytest.mark.slow
def test_the_predicted_step_of_tiny_is_the_committed_one(tmp_path):
    """Within 3% under the Triton that the file names. Under another one, whose code is its own, what is compared is which
    kernels a step launches on every architecture, and that none of them touches local memory."""
    same = triton.__version__ == COMMITTED["versions"]["triton"]
    out = tmp_path / "tiny.json"
    run(BENCHMARKS / "predicted.py", "--model", "tiny", "--parts", "times" if same else "resources", "--out", out)
    found = json.loads(out.read_text())
    if not same:
        print(f"triton {triton.__version__}, not {COMMITTED['versions']['triton']}: kernels and resources compared, no times")
        names = {(r["arch"], r["kernel"]) for r in COMMITTED["resources"] if r["size"] == "tiny"}
        assert names == {(r["arch"], r["kernel"]) for r in found["resources"] if r["arch"] != "sm_90"}
        assert [row for row in found["resources"] if row["local_bytes"]] == []
        return
    steps = {step["pass"]: step["step_ms"] for step in COMMITTED["steps"] if step["size"] == "tiny"}
    assert {step["pass"]: step["step_ms"] for step in found["steps"]} == pytest.approx(steps, rel=0.03)


def test_the_committed_prediction_is_whole():
    """Four sizes, training and inference, and CRATE-MAE's training; every kernel with its floor, which no estimate is under,
    and no local memory."""
    assert {(s["size"], s["pass"]) for s in COMMITTED["steps"]} == {
        (size, what) for size in ("tiny", "small", "base", "large") for what in ("training", "inference")
    } | {(f"mae-{size}", "training") for size in ("tiny", "small", "base", "large")}
    for row in COMMITTED["rows"]:
        assert 0 < row["floor_us"] <= 1.01 * row["estimate_us"], row
        assert row["bound_us"] == max(row["pipes_us"].values())
    assert {r["arch"] for r in COMMITTED["resources"]} == {"sm_80", "sm_100"}
    assert [r for r in (*COMMITTED["rows"], *COMMITTED["resources"]) if r["local_bytes"]] == []
    assert all({"value", "unit", "standing", "why"} == set(c) for c in COMMITTED["constants"].values())


def changed(factor: float) -> dict:
    rows = [row | {"estimate_us": row["estimate_us"] * factor} for row in COMMITTED["rows"]]
    return COMMITTED | {"rows": rows, "steps": [s | {"step_ms": s["step_ms"] * factor} for s in COMMITTED["steps"]]}


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (0.9, 0), (1.1, 1)])
def test_comparing_says_what_got_slower(tmp_path, capsys, factor, status):
    for name, result in (("old", COMMITTED), ("new", changed(factor))):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert report.compare(tmp_path / "old.json", tmp_path / "new.json") == status
    assert ("tiny training mssa_forward" in capsys.readouterr().out) == (factor != 1.0)
    assert report.compare(tmp_path / "absent.json", tmp_path / "new.json") == 2


def test_calibration_takes_rates_clock_and_factors_from_a_gpu(tmp_path, monkeypatch, capsys):
    """A made-up GPU on which attention takes twice as long as predicted."""
    path = tmp_path / "calibration.json"
    monkeypatch.setattr(constants, "CALIBRATION", path)
    monkeypatch.setattr(report, "CALIBRATION", path)
    row = next(r for r in COMMITTED["rows"] if (r["size"], r["pass"], r["kernel"]) == ("tiny", "training", "mssa_forward"))
    conditions = [{"clocks.sm,clocks.mem": "1500 MHz, 2619 MHz"}]
    made_up = {
        "machine": {"device": "made up"},
        "ceilings": {"bfloat16": {"bytes_per_second": 4e12, "flops_per_second": 7e14}},
        "rows": [
            {"what": "mssa forward", "size": "tiny", "batch": 1024, "peer": "crate_fast", "mode": "eager",
             "ms": 2e-3 * row["estimate_us"], "conditions": conditions},
        ],
    }  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps(made_up))
    assert report.calibrate(tmp_path / "gpu.json", BENCHMARKS / "results" / "predicted.json") == 0
    assert "measured" in capsys.readouterr().out
    values = constants.values()
    assert (values["DRAM"], values["product rate"], values["clock"]) == (4e12, 7e14, 1.5e9)
    assert values["factor, attention forward"] == pytest.approx(2.0)
    assert values["factor, product"] == 1.0
    assert constants.described()["DRAM"]["standing"] == "measured"
    assert report.calibrate(tmp_path / "absent.json", BENCHMARKS / "results" / "predicted.json") == 2

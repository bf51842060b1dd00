"""`make gpu` as far as it goes without a GPU: the rehearsed queue, a state that is carried, no speed without parity."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BENCHMARKS

import gpu
from gpu_queue import cache, kinds, shard, speed
from gpu_queue import state as states
from gpu_queue.queue import SHARDS, Step, queue

ROOT = BENCHMARKS.parent
MACHINE = {"device": "some GPU", "architecture": "sm_90", "torch": "2", "triton": "3", "driver": None}
REHEARSED = (
    "parity tiny", "parity base", "train base", "ours alone base", "published alone tiny", "layer and operations tiny",
    "tests 1/1", "graph tiny", "inference graphs tiny", "precision", "tune tiny", "photographs",
)  # fmt: skip
"""Of every kind of step, mode and end."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A bare copy of what is committed of the project; nothing of it is installed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("benchmarks", "crate_fast", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def command(checkout: Path, *flags) -> dict:
    """The arguments of subprocess for `gpu.py` in a checkout, away from it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return {
        "args": [sys.executable, checkout / "benchmarks" / "gpu.py", *map(str, flags)],
        "env": environment | {"CUDA_VISIBLE_DEVICES": ""}, "cwd": checkout.parent, "text": True,
    }  # fmt: skip


def records(state: Path) -> dict[str, dict]:
    return {record["step"]: record for record in json.loads((state / "results.json").read_text())["records"]}


@pytest.mark.slow
def test_the_queue_is_rehearsed_from_a_bare_checkout(checkout, tmp_path):
    flags = ("--rehearse", "--only", ",".join(REHEARSED), "--state", tmp_path / "state")
    done = subprocess.run(**command(checkout, *flags), capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path / "state")
    assert {name: record["outcome"] for name, record in found.items()} == dict.fromkeys(REHEARSED, "passed")
    assert [(row["batch"], row["peer"], row.get("reason")) for row in found["train base"]["rows"]] == [
        (16, "published", "out of memory"), (8, "published", None), (8, "sdpa", None), (8, "crate_fast", None),
    ]  # fmt: skip
    assert {row["peer"] for row in found["graph tiny"]["rows"] if row["samples"] == 2} == set(kinds.SIDE_BY_SIDE)
    assert 0 <= found["photographs"]["rows"][0]["waiting"] <= 1
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"results.json", "shapes.json"}
    assert len(json.loads((tmp_path / "state" / "shapes.json").read_text())["rehearsal"]) >= 9


@pytest.mark.slow
def test_what_was_killed_goes_on_elsewhere(checkout, tmp_path):
    """Killed while the second step runs; the state is carried to another folder, where only the rest is run."""
    steps = ("parity tiny", "train tiny", "ours alone tiny")
    flags = ("--rehearse", "--only", ",".join(steps), "--state")
    with subprocess.Popen(**command(checkout, *flags, tmp_path / "here"), stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith("parity tiny"):
                break
        process.send_signal(signal.SIGKILL)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    before = (tmp_path / "there" / "results.json").read_text()
    assert [record["step"] for record in json.loads(before)["records"]] == ["parity tiny"]
    done = subprocess.run(**command(checkout, *flags, tmp_path / "there"), capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train tiny: passed" in done.stdout and "parity tiny:" not in done.stdout
    assert set(records(tmp_path / "there")) == set(steps)
    assert records(tmp_path / "there")["parity tiny"] == json.loads(before)["records"][0]


COMPILED_AHEAD = """
import sys
from pathlib import Path
from unittest import mock
import torch
import triton
from gpu_queue import ahead, cache
from crate_fast import kernels, functional
from triton.compiler.compiler import CompiledKernel

def run():
    w = torch.zeros(1, 16, 32, dtype=torch.float16)
    functional.mssa(w, 2, backend="triton")

scratch = Path(sys.argv[2])
if __name__ == "__main__" and sys.argv[1] == "ahead":
    ahead.compile_ahead(Path(sys.argv[3]), scratch, run)
elif __name__ == "__main__":
    cache.unpack(Path(sys.argv[3]) / "kernels.tar.xz", scratch / "triton")
    hits = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    driver = mock.Mock(**{"get_current_target.return_value": ahead.TARGET, "get_current_device.return_value": 0})
    with mock.patch.object(triton.runtime.driver, "_active", driver), mock.patch.object(kernels, "INTERPRETED", True), \\
         mock.patch.object(CompiledKernel, "run", lambda *_: None), \\
         mock.patch.object(CompiledKernel, "launch_metadata", lambda *_: None):
        run()
    print(hits)
"""


@pytest.mark.slow
def test_a_kernel_compiled_ahead_is_not_compiled_again_in_another_folder(tmp_path):
    """By Triton's own launch code, with a driver's stand-in, in a process that finds the cache where it was not written."""
    (tmp_path / "script.py").write_text(COMPILED_AHEAD)

    def start(what: str, scratch: Path) -> str:
        environment = os.environ | cache.environment(scratch / "triton") | {"TRITON_INTERPRET": "0"}
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{BENCHMARKS}"
        scratch.mkdir()
        arguments = [sys.executable, tmp_path / "script.py", what, scratch, tmp_path / "state"]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout

    assert "1 kernels for sm_90" in start("ahead", tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    assert start("launch", tmp_path / "there") == "[True]\n"
    files = [path for path in (tmp_path / "there" / "triton").rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.name != "lock"} <= set(cache.KEPT)


def test_a_second_process_waits_for_the_first_to_compile(tmp_path):
    script = (
        "import sys, time; from gpu_queue import cache as shared\n"
        "cache = shared.SharedCache('key')\n"
        "if cache.get_group('kernel.json') is None:\n"
        "    print('compiles', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    cache.put_group('kernel.json', {'kernel.json': cache.put('{}', 'kernel.json', binary=False)})\n"
    )
    environment = os.environ | cache.environment(tmp_path) | {"PYTHONPATH": str(BENCHMARKS)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert sorted(process.communicate()[0] for process in processes) == ["", "", "compiles\n"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Runs steps made of Python functions; (whether none failed, the state)."""
    monkeypatch.setattr("gpu_queue.process.GPU", torch.device("cpu"))
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")

    def start(budget: float = 60.0, **steps):
        functions = {name: function for name, (function, _) in steps.items()}
        monkeypatch.setattr(kinds, "KINDS", functions)
        state = states.State(tmp_path / "state", tmp_path / "scratch", MACHINE)
        rows = [Step(name, name, {}, needs, work=0.1, seconds=3) for name, (_, needs) in steps.items()]
        where = {"scratch": tmp_path / "scratch", "workers": 1, "rehearse": False, "name": "some GPU"}
        return gpu.run_queue(rows, state, where, time.monotonic() + gpu.MARGIN + budget, False), state

    return start


def passes(options, place) -> None:
    place.save([{"suite": "loop", "what": "it", "speed": 1.0}])


def fails(options, place) -> None:
    place.save([{"suite": "loop", "what": "the half", "speed": 1.0}])
    raise ValueError("what went wrong")


def has_no_room(options, place) -> None:
    raise torch.OutOfMemoryError("too large")


def hangs(options, place) -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=False)


def dies(options, place) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_fails_is_recorded_and_the_queue_goes_on(place):
    good, state = place(
        failing=(fails, ()), full=(has_no_room, ()), hanging=(hangs, ()), dying=(dies, ()), timed=(passes, ("failing",)),
        last=(passes, ()),
    )  # fmt: skip
    outcomes = {record["step"]: record["outcome"] for record in state.records}
    assert not good
    assert outcomes == {
        "failing": "failed", "full": "out of memory", "hanging": "cut off", "dying": "ended with -9", "last": "passed",
    }  # fmt: skip
    failed = state.record_of("failing")
    assert "ValueError: what went wrong" in failed["last_lines"][-1]
    assert [row["what"] for row in failed["rows"]] == ["the half"]


def test_nothing_is_timed_before_these_kernels_have_passed_and_failures_come_last(place, monkeypatch, capsys):
    assert place(parity=(fails, ()), timed=(passes, ("parity",)))[0] is False
    assert "timed: not run, since this has not passed: parity" in capsys.readouterr().out
    good, state = place(parity=(passes, ()), other=(passes, ()), timed=(passes, ("parity",)))
    assert [record["step"] for record in state.records] == ["other", "parity"] and not good
    good, state = place(parity=(fails, ()), other=(fails, ()), timed=(passes, ("parity",)))
    assert good and state.outcome("timed") == "passed"
    monkeypatch.setattr(states, "digest", lambda: "other kernels")
    good, state = place(timed=(passes, ("parity",)))
    assert good and state.outcome("parity") == state.outcome("timed") == ""


def test_parity_holds_for_an_architecture_and_times_for_a_device(tmp_path):
    state = states.State(tmp_path, tmp_path / "scratch", MACHINE)
    for kind in ("parity", "train"):
        state.add(Step(kind, kind, {}), {"outcome": "passed", "rows": []})
    other = states.State(tmp_path, tmp_path / "scratch", MACHINE | {"device": "another GPU"})
    assert (other.outcome("parity"), other.outcome("train")) == ("passed", "")
    newer = states.State(tmp_path, tmp_path / "scratch", MACHINE | {"architecture": "sm_100"})
    assert newer.outcome("parity") == ""


def test_a_step_that_the_budget_cuts_off_is_as_if_it_had_not_begun(place, capsys):
    good, state = place(1.0, hanging=(hangs, ()), last=(passes, ()), timed=(passes, ("last",)))
    assert good and state.records == []
    printed = capsys.readouterr().out
    assert "hanging: cut off by the budget; the next call starts it again" in printed
    assert "last: left for the next call" in printed and "timed: not run" in printed


def test_the_digest_covers_what_launches_kernels():
    """All that crate_fast's model imports of the package, but what computes nothing."""
    import grimp  # which a machine with a GPU has not, where this file is collected

    graph = grimp.build_graph("crate_fast")
    nothing = {"cache", "checkpoint", "errors", "eval_transform", "files", "kernels", "optional", "sizes"}
    imported = graph.find_upstream_modules("crate_fast.model", as_package=True)
    rooms = {name.split(".")[1] for name in imported if name.count(".")} | {"model"}
    assert {pattern.removesuffix(".py").removesuffix("/*") for pattern in states.LAUNCHERS} == rooms - nothing


def test_the_queue_keeps_its_limits_and_begins_with_parity_and_speed_of_tiny():
    steps = queue()
    names = [step.name for step in steps]
    assert names[:2] == ["parity tiny", "train tiny"] and len(set(names)) == len(names)
    for place_, step in enumerate(steps):
        assert step.seconds <= (240 if step.name.startswith("compiled") else 120)
        assert set(step.needs) <= set(names[:place_])
        assert step.kind in kinds.KINDS
        assert step.kind in ("parity", "tests") or any(need.split()[0] in ("parity", "tests", "tune") for need in step.needs)
    home, spent = set(), 0.0
    for step in steps:
        spent += step.estimate(14)
        home |= {step.name} if spent < 540 - gpu.MARGIN else set()
    assert {"train tiny", "inference tiny", "train base"} <= home


def test_every_gpu_test_is_in_one_part():
    items = list(range(171))
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    found = []
    for part in range(SHARDS):
        config.getoption, own = lambda name, part=part: f"{part}/{SHARDS}", list(items)
        shard.pytest_collection_modifyitems(config, own)
        found += own
    assert found == items


def test_batches_are_planned_for_the_largest_peer(monkeypatch):
    monkeypatch.setattr(speed, "memory_gib", lambda device: 78.0)
    first = {size: speed.planned(size, "published", None)[0] for size in ("tiny", "small", "base", "large")}
    assert first == {"tiny": 1024, "small": 1024, "base": 512, "large": 256}
    assert all(speed.planned(size, "crate_fast", None)[0] == 1024 for size in first)
    assert speed.own_most("base", "published", None)[:2] == [976, 928]


def test_wheels_are_unpacked_only_where_something_is_missing(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("torch", "not_here_at_all"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    gpu.use_wheels(tmp_path, tmp_path / "packages")
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["not_here_at_all"]
    assert sys.path[-1] == str(tmp_path / "packages")


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--only", "speed"], "--only names 'speed'; allowed are "), (["--state", __file__], "no directory")],
)
def test_wrong_arguments_are_named(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_gpu_it_is_one_line(tmp_path):
    done = subprocess.run(**command(ROOT, "--state", tmp_path), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.py: error: this command needs a CUDA GPU, and PyTorch finds none here\n"

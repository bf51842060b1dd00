"""A model in parts (FSDP2): fused as ever, DDP's losses, and checkpoints in parts that are whole or not there."""

import copy
import json
import pickle
import re
import shutil
from pathlib import Path

import kill
import pytest
import torch
import torch.distributed as dist
from conftest import call
from test_loop import torchrun
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from crate_fast import CRATE, load_checkpoint
from crate_fast.checkpoint.read import CheckpointError
from crate_fast.device import Compute
from crate_fast.kernels import runtime
from crate_fast.optimizers import OPTIMIZERS
from crate_fast.processes import ALONE, process_group
from crate_fast.settings import listed
from crate_fast.training import ConfigError, TrainConfig, evaluate_run, train
from crate_fast.training.parallel import check_strategy

SIZES = dict(image_size=16, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, dim_head=16)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def alone(tmp_path):
    """A process group of one, as a mesh."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def in_parts(model: CRATE, mesh, layers: bool = True, **options) -> CRATE:
    for layer in model.transformer.layers if layers else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def kernels_of(model: CRATE, dtype: torch.dtype | None) -> tuple[torch.Tensor, list[str]]:
    """Logits, and the kernels of forward and backward but for the one that prepares weights, which whole layers do together."""
    seen: list[str] = []
    with runtime.observed(lambda kernel, *_: seen.append(kernel.fn.__name__)):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits = model(IMAGES)
        logits.float().square().mean().backward()
    return logits, [name for name in seen if name != "_prepare_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dtype", "layers"), [("triton", torch.float16, True), ("triton", None, False), ("torch", None, True)]
)
def test_layers_in_parts_compute_as_they_do_whole(alone, backend, dtype, layers):
    torch.manual_seed(0)
    whole = CRATE(**SIZES, backend=backend)
    parts = in_parts(copy.deepcopy(whole), alone, layers)
    (logits, kernels), (logits_of_parts, kernels_of_parts) = kernels_of(whole, dtype), kernels_of(parts, dtype)
    assert torch.equal(logits_of_parts, logits)
    assert kernels_of_parts == kernels
    assert len(kernels) >= (22 if backend == "triton" else 0)  # eleven a layer
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.grad.full_tensor(), theirs.grad)
    for model in (whole, parts):
        model.eval()
    with torch.no_grad():
        for _ in range(2):  # what evaluation keeps from call to call must not outlive the weights
            assert torch.equal(parts(IMAGES), whole(IMAGES))
            parts.reshard()  # else the root's weights stay whole, and apart from those that are moved
            for weight in (*whole.parameters(), *parts.parameters()):
                weight.mul_(1.25)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float16), ("triton", None), ("torch", torch.bfloat16), ("torch", None)]
)
def test_layers_in_parts_return_nothing_that_pytorch_warns_of(alone, backend, dtype, recwarn):
    """A view, of which one who writes to it in place loses the gradient."""
    model = CRATE(**SIZES | {"depth": 1}, backend=backend)
    fully_shard(model.transformer.layers[0][1].fn, mesh=alone)
    for parts in (model, in_parts(CRATE(**SIZES | {"depth": 1}, backend=backend), alone)):
        kernels_of(parts, dtype)
    assert [str(warning.message) for warning in recwarn if "FSDP2" in str(warning.message)] == []


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_a_step_returns_is_not_changed_before_its_gradient_unnoticed(backend):
    layer = CRATE(**SIZES | {"depth": 1}, backend=backend).transformer.layers[0]
    for module in (layer, layer[1].fn):
        y = module(torch.randn(2, 5, 32))
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_layers_that_are_watched_or_cast_run_their_modules(alone):
    torch.manual_seed(0)
    whole = CRATE(**SIZES, backend="triton")
    hooked = in_parts(copy.deepcopy(whole), alone)
    seen = []
    hooked.transformer.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    hooked.transformer.layers[1][0].register_forward_hook(lambda *_: seen.append("attention"))
    logits, _ = kernels_of(hooked, None)
    assert seen == ["layer", "attention"]
    assert torch.allclose(logits, whole(IMAGES), atol=1e-5)
    cast = in_parts(copy.deepcopy(whole), alone, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
    logits, _ = kernels_of(cast, torch.float16)
    assert torch.allclose(logits.float(), whole(IMAGES), atol=3e-2)


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    """As `--device cuda` or auto names it; PyTorch's set_device, here up to where it asks the driver, refuses it."""
    made, chosen = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: made.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.cuda._utils._get_device_index(device)))
    for name in ("cuda", "cuda:1"):
        with process_group(ALONE, torch.device(name), alone=True):
            pass
    assert (made, chosen) == (["nccl", "nccl"], [1])


def test_an_optimizer_that_cannot_move_parts_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    """As under PyTorch 2.11, which has no rule for the sign of tensors in parts."""
    signs = torch._foreach_sign_

    def of_whole_tensors(tensors):
        if isinstance(tensors[0], DTensor):
            raise NotImplementedError("Operator aten._foreach_sign_.default does not have a sharding strategy registered.")
        return signs(tensors)

    monkeypatch.setattr(torch, "_foreach_sign_", of_whole_tensors)
    line = ("train", "--strategy", "fsdp", "--optimizer", "Lion", "--device", "cpu", "--out", tmp_path / "run")
    status, _, err = call(capsys, *line)
    assert status == 2
    others = listed(name for name, known in OPTIMIZERS.items() if known.needs is None)
    assert re.fullmatch(f"crate-fast: error: --optimizer is 'Lion' and --strategy is 'fsdp', .*{others} can\n", err)
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


LOSSES = """
import copy, sys, torch
from dataclasses import replace
from crate_fast import CRATE
from crate_fast.training import TrainConfig, train
from crate_fast.device import choose_compute
from crate_fast.processes import process_group, read_ranks
from crate_fast.training.parallel.fsdp import shard
from test_sharding import SIZES, kernels_of

config = TrainConfig(image_size=8, dim=18, depth=2, heads=3, dim_head=6, device="cpu", num_threads=1, log_every=1,
                     epochs=1, batch_size=140, lr=1e-3)
cases = {
    "lion": dict(accumulate=2, clip_norm=0.5, ema=0.9, dropout=0.1, drop_path=0.2, mixup=0.2),
    "adamw": dict(optimizer="AdamW", decay="matrices", precision="bfloat16"),
    "scaled": dict(optimizer="AdamW", precision="float16", clip_norm=0.5),
}
for name, changes in cases.items():
    for strategy in ("ddp", "fsdp"):
        train(replace(config, strategy=strategy, out=f"{sys.argv[1]}/{name}-{strategy}", **changes))

ranks, compute = read_ranks(), choose_compute("cpu", "float16")
with process_group(ranks, compute.device):
    torch.manual_seed(0)
    whole = CRATE(**SIZES, backend="triton")
    parts = copy.deepcopy(whole)
    shard(parts, compute, 2)
    (logits, kernels), (logits_of_parts, kernels_of_parts) = kernels_of(whole, torch.float16), kernels_of(parts, torch.float16)
    gradients = [(a.grad.full_tensor(), b.grad) for a, b in zip(parts.parameters(), whole.parameters())]
    same = torch.equal(logits, logits_of_parts) and all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in gradients)
    if ranks.first and same and kernels == kernels_of_parts:
        print(f"as one: {len(kernels)} kernels")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of ten steps on two processes, by either strategy."""
    place = tmp_path_factory.mktemp("strategies")
    (place / "losses.py").write_text(LOSSES)
    done = torchrun(2, place / "losses.py", place)
    assert done.returncode == 0, done.stderr
    (place / "printed").write_text(done.stdout)
    return place


@pytest.mark.slow
def test_layers_on_two_processes_run_the_kernels_of_one(trained):
    assert re.search(r"as one: (2[2-9]) kernels", (trained / "printed").read_text())


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "tolerance"), [("lion", 1e-5), ("adamw", 1e-5), ("scaled", 1e-4)])
def test_both_strategies_have_the_same_losses(trained, case, tolerance):
    """But for the order of sums, which weights rounded to float16 amplify."""
    ddp, fsdp = (rows(trained / f"{case}-{strategy}") for strategy in ("ddp", "fsdp"))
    assert [row["split"] for row in fsdp] == ["train"] * 10 + ["test"]
    assert [row["loss"] for row in fsdp] == pytest.approx([row["loss"] for row in ddp], rel=tolerance)
    assert [row["count"] for row in fsdp] == [140] * 10 + [360]
    models = [load_checkpoint(trained / f"{case}-{strategy}").state_dict() for strategy in ("ddp", "fsdp")]
    for name, weight in models[0].items():
        # A gradient near zero may change its sign, and the step with it: a few steps of one learning rate. One such weight is
        # chance, and in a vector of 18 more than this mean: the farthest does not count in it.
        apart = (models[1][name] - weight).abs()
        assert apart.max() < 4e-3, name
        assert (apart.sum() - apart.max()) / apart.numel() < 1e-4, name


@pytest.mark.slow
def test_one_process_reads_a_checkpoint_in_parts(trained, capsys):
    run = trained / "lion-fsdp"
    newest = run / "checkpoints" / "last.dcp"
    assert sorted(file.name for file in newest.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"]
    weights, final = (load_checkpoint(path).state_dict() for path in (newest, run))
    assert all(torch.equal(weights[name], value) for name, value in final.items())
    last = rows(run)[-1]
    for path in (run, newest):
        status, out, _ = call(capsys, "evaluate", path)
        assert status == 0
        assert f"({last['correct']} of 360), top-5 {last['top5']:.2%}, loss {last['loss']:.4f}" in out


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained / "lion-fsdp", tmp_path / "run", symlinks=True))
    half = run / "checkpoints" / ".step-00000099.dcp.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half of it")
    status, out, err = call(capsys, "train", "--resume", run, "--peak-tflops", "1")
    assert status == 0
    assert "going on after step 10 of 10" in out
    assert "ranks was 2 and is 1: the run goes on with the same images in the same order" in err
    assert not half.exists()
    ours, theirs = (load_checkpoint(path).state_dict() for path in (run, trained / "lion-fsdp"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert not dist.is_initialized()


@pytest.mark.slow
def test_what_is_damaged_is_named_and_not_taken(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained / "adamw-fsdp", tmp_path / "run", symlinks=True))
    path = next((run / "checkpoints").glob("step-*.dcp"))
    part = path / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000010\.dcp: damaged: __1_0\.distcp is not what was written"):
        load_checkpoint(path)
    part.unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp cannot be read \(No such file"):
        evaluate_run(path)
    before = sorted((run / "checkpoints").iterdir()), (run / "metrics.jsonl").read_bytes()
    status, _, err = call(capsys, "train", "--resume", run)
    assert status == 2
    assert "is whole, so the run cannot go on" in err
    assert before == (sorted((run / "checkpoints").iterdir()), (run / "metrics.jsonl").read_bytes())


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "table", [pickle.dumps(Hostile()), pickle.dumps({"a": 1}), b"no pickle"], ids=["code", "dict", "noise"]
)
def test_tables_of_parts_are_read_without_running_anything(trained, tmp_path, table):
    path = Path(shutil.copytree(trained / "adamw-fsdp" / "checkpoints" / "last.dcp", tmp_path / "some.dcp"))
    state = torch.load(path / "state.pt")
    (path / ".metadata").write_bytes(table)
    del state["parts"][".metadata"]
    torch.save(state, path / "state.pt")
    with pytest.raises(CheckpointError, match=r"some\.dcp: damaged: \.metadata"):
        load_checkpoint(path)
    run = shutil.copytree(trained / "adamw-fsdp", tmp_path / "run", symlinks=True)
    newest = next((run / "checkpoints").glob("step-*.dcp"))
    shutil.rmtree(newest)
    shutil.copytree(path, newest)
    with pytest.raises(CheckpointError, match=r"damaged: \.metadata"):
        train(TrainConfig(), resume=str(run))


def rewritten(path: Path, change) -> Path:
    """The checkpoint `path` with a table of its parts that is changed, its checksum left out."""
    table, state = pickle.loads((path / ".metadata").read_bytes()), torch.load(path / "state.pt")
    change(path, table)
    (path / ".metadata").write_bytes(pickle.dumps(table))
    del state["parts"][".metadata"]
    torch.save(state, path / "state.pt")
    return path


def first_place(table):
    """Where the first chunk of the model lies."""
    return next(place for index, place in table.storage_data.items() if index.fqn.startswith("model."))


def lose_a_chunk(path: Path, table) -> None:
    table.state_dict_metadata["model.mlp_head.1.weight"].chunks.pop()


def double_a_chunk(path: Path, table) -> None:
    chunks = table.state_dict_metadata["model.mlp_head.1.weight"].chunks
    chunks[1] = chunks[0]


def lead_elsewhere(path: Path, table) -> None:
    place = first_place(table)
    shutil.copy(path / place.relative_path, path.parent / "other")
    place.relative_path = "../other"


def lie_in_a_link(path: Path, table) -> None:
    place = first_place(table)
    shutil.move(path / place.relative_path, path.parent / "other")
    (path / place.relative_path).symlink_to(path.parent / "other")


def be_huge(path: Path, table) -> None:
    entry = table.state_dict_metadata["model.mlp_head.1.weight"]
    entry.size = torch.Size((1 << 32, 1 << 32))
    entry.chunks = [type(entry.chunks[0])(torch.Size((0, 0)), entry.size)]


@pytest.mark.slow
@pytest.mark.parametrize("change", [lose_a_chunk, double_a_chunk, lead_elsewhere, lie_in_a_link, be_huge])
def test_tables_that_do_not_tell_of_whole_tensors_in_their_folder_are_refused(trained, tmp_path, change):
    path = shutil.copytree(trained / "adamw-fsdp" / "checkpoints" / "last.dcp", tmp_path / "some.dcp")
    with pytest.raises(CheckpointError, match=r"some\.dcp: damaged"):
        load_checkpoint(rewritten(path, change))


@pytest.mark.slow
def test_a_run_in_parts_killed_while_it_saves_ends_as_one_that_was_not(tmp_path):
    kill.compare(tmp_path, 1, (0,), ("writing",), ("--strategy", "fsdp", "--epochs", "1"))


def test_what_cannot_be_in_parts_is_refused(tmp_path):
    for other in ("compile", "cuda_graphs"):
        with pytest.raises(ConfigError, match=f"--{other.replace('_', '-')} is 'yes' and --strategy is 'fsdp'"):
            TrainConfig(strategy="fsdp", **{other: "yes"})
    with pytest.raises(ConfigError, match="--strategy is 'fsdp', for CPUs and CUDA GPUs; --device is 'auto', here mps"):
        check_strategy(TrainConfig(strategy="fsdp"), Compute(torch.device("mps"), "float32"))

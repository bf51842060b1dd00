"""Folders that others write by torch.distributed.checkpoint: the weights are read, and nothing else in them is."""

import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import call
from torch.distributed import checkpoint as dcp

from crate_fast import CRATE, CheckpointError, load_checkpoint
from crate_fast.checkpoint.start_from import read_weights

SMALL = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8}


def model(seed=0) -> CRATE:
    torch.manual_seed(seed)
    return CRATE(**SMALL)


def stepped(kind=torch.optim.AdamW) -> dict:
    """Weights beside the state of an optimizer."""
    ours = model()
    optimizer = kind(ours.parameters(), lr=0.0)
    ours(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {"model": ours.state_dict(), "optimizer": optimizer.state_dict()}


class Named(dict):
    """A Stateful, as FSDP2's examples save one."""

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, state_dict):
        self.update(state_dict)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


LAYOUTS = {
    "under a key": lambda: {"model": model().state_dict()},
    "bare": lambda: model().state_dict(),
    "an optimizer beside": stepped,
    "plain values beside": lambda: {"model": model().state_dict(), "epoch": 3, "args": {"lr": 1e-3, "names": ["a"]}},
    "an object beside": lambda: {"model": model().state_dict(), "args": Hostile()},
    "an application": lambda: {"app": Named(stepped())},
    "of DistributedDataParallel": lambda: {"state_dict": {f"module.{k}": v for k, v in model().state_dict().items()}},
    "part of another": lambda: {"net": {f"student.backbone.{k}": v for k, v in model().state_dict().items()}},
    "of names with points": lambda: {f"model.{name}": value for name, value in model().state_dict().items()},
    "a mean beside": lambda: {"model": model(1).state_dict(), "ema": model().state_dict()},
    "random state beside": lambda: {"model": model().state_dict(), "rng": torch.get_rng_state()},
}


def written(path: Path, content: dict) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("parts") / "step-10", {"model": model().state_dict(), "epoch": 1})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_where_people_put_them(layout, tmp_path):
    loaded = load_checkpoint(written(tmp_path / "mine", LAYOUTS[layout]()), heads=2).state_dict()
    expected = model().state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_commands_and_training_read_them_too(folder, tmp_path, capsys):
    assert read_weights(folder).weights["cls_token"].shape == (1, 1, 16)
    assert call(capsys, "convert", folder, tmp_path / "x.safetensors", "--heads", "2")[0] == 0
    assert torch.equal(load_checkpoint(tmp_path / "x.safetensors").cls_token, model().cls_token)


def test_what_has_no_weights_or_several_models_is_refused_in_a_line(tmp_path):
    none = written(tmp_path / "none", {"optimizer": {"state": torch.zeros(3)}})
    with pytest.raises(CheckpointError, match=r"none: no weights of a CRATE in it"):
        load_checkpoint(none)
    two = written(tmp_path / "two", {"student": model().state_dict(), "teacher": model(1).state_dict()})
    with pytest.raises(CheckpointError, match=r"two: it has several models \('student', 'teacher'\)"):
        load_checkpoint(two)


@pytest.mark.parametrize(
    "table", [pickle.dumps(Hostile()), pickle.dumps({"a": 1}), b"no pickle"], ids=["code", "dict", "noise"]
)
def test_a_table_that_is_none_is_refused_and_runs_nothing(folder, table, tmp_path):
    path = shutil.copytree(folder, tmp_path / "x")
    (path / ".metadata").write_bytes(table)
    with pytest.raises(CheckpointError, match=r"x: damaged, or no checkpoint of torch\.distributed: \.metadata"):
        load_checkpoint(path)


def test_a_table_that_leads_out_of_the_folder_or_to_nothing_is_refused(folder, tmp_path):
    for number, (part, words) in enumerate({"../elsewhere": "no file of the checkpoint", "__9_9.distcp": "no file"}.items()):
        path = shutil.copytree(folder, tmp_path / str(number))
        table = pickle.loads((path / ".metadata").read_bytes())
        for place in table.storage_data.values():
            place.relative_path = part
        shutil.copy(path / "__0_0.distcp", tmp_path / "elsewhere")
        (path / ".metadata").write_bytes(pickle.dumps(table))
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(path)


def test_a_weight_that_is_a_pickle_is_never_unpickled(folder, tmp_path):
    """Where the table says that it is a tensor."""
    path = written(tmp_path / "x", {"model": model().state_dict(), "args": [Hostile()] * 50})
    table = pickle.loads((path / ".metadata").read_bytes())
    places = {index.fqn: place for index, place in table.storage_data.items()}
    code, weight = places["args"] if "args" in places else places["args.0"], places["model.cls_token"]
    weight.offset, weight.length = code.offset, code.length
    (path / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match=r"x: damaged"):
        load_checkpoint(path, heads=2)


def test_a_run_s_own_checkpoint_without_its_state_is_damaged_and_no_folder_of_others(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "step-00000010.dcp")
    with pytest.raises(CheckpointError, match=r"damaged: it has no state\.pt"):
        load_checkpoint(path)

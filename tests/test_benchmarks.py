"""The benchmarks' own promises: no speed without parity, results that open, a README that quotes them, traffic as promised."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import BENCHMARKS, load_module
from PIL import Image

import floors
import report
import run
import traffic
from crate_fast import CRATEAlpha_large
from peers import all_peers
from workloads import Workload, prepare

ROOT = BENCHMARKS.parent
ROW = {
    "suite": "inference", "what": "inference", "size": "tiny", "batch": 8, "dtype": "float32", "peer": "crate_fast",
    "mode": "eager", "ms": 10.0, "ms_q1": 9.9, "ms_q3": 10.1,
}  # fmt: skip


def benchmark(*flags: str, tree: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, tree / "benchmarks" / "run.py", *flags]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("layer", 4), ("encoder", 4), ("decoder", 2.8)])
def test_a_layer_moves_and_launches_what_was_promised(kind, least):
    """Of a CRATE, and of a CRATE-MAE's encoder and decoder, whose published layer computes less."""
    ours, published = traffic.layer_traffic(True, kind), traffic.layer_traffic(False, kind)
    forward, backward = ([kernel for kernel in ours[part] if kernel.activations] for part in ("forward", "backward"))
    assert len(forward) <= 4
    assert sum(kernel.activations for kernel in forward) <= 18 * traffic.DIM
    assert len(backward) <= 8  # one that reads dw again, since its row sums would cost attention a program a multiprocessor
    assert sum(kernel.activations for kernel in backward) <= 42 * traffic.DIM
    weights_alone = [kernel.name for part in ours.values() for kernel in part if not kernel.activations]
    assert set(weights_alone) == ({"finish"} if kind == "decoder" else {"prepare", "finish"})
    for part, kernels in (("forward", forward), ("backward", backward)):
        assert len(published[part]) > least * len(kernels)
        assert sum(k.activations for k in published[part]) > least * sum(k.activations for k in kernels)


@pytest.mark.slow
def test_the_count_sees_what_kernels_touch():
    """Bytes counted of a kernel whose traffic is known: w read and o written, 16 bit, and a float32 a head and padded token, of
    which there are 48 for 37 tokens, so that they are counted whole."""
    kernel = next(k for k in traffic.layer_traffic(True, "layer")["forward"] if k.name.startswith("mssa"))
    assert (kernel.activations, kernel.statistics, kernel.weights) == (4 * traffic.DIM, 0, 4 * traffic.HEADS * 48)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A short run on one operation and one image, with a stand-in for a checkout of the published repository."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "model").mkdir()
    (folder / "model" / "crate.py").write_text("from crate_fast.reference import CRATE\n")
    flags = ["--device", "cpu", "--quick", "--what", "mssa both,ista both,inference", "--batch", "1"]
    result = benchmark(*flags, "--published", str(folder), "--out", str(folder / "cpu.json"))
    assert result.returncode == 0, result.stderr
    return result.stdout, folder / "cpu.json"


@pytest.mark.slow
def test_results_hold_everything_that_was_measured(measured):
    output, path = measured
    result = json.loads(path.read_text())
    rows = {(row["what"], row["peer"]): row for row in result["rows"]}
    assert {"published", "published checkout", "sdpa", "timm ViT", "crate_fast"} == {peer for _, peer in rows}
    assert {"mssa both", "ista both", "inference"} == {what for what, _ in rows}
    for row in result["rows"]:
        assert ("ms" in row) != ("reason" in row)
        if "ms" in row:
            assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"]
            assert row["samples"] >= 4
            assert row["peer"] == "timm ViT" or 0 < row["errors"][0] < 1e-5
            assert 0 < row["fraction_of_floor"] < 1
    assert rows["mssa both", "crate_fast"]["kept_bytes"] < rows["mssa both", "published"]["kept_bytes"] / 2
    assert rows["inference", "crate_fast"]["peak_bytes"] > 197 * 384 * 4
    assert result["ceilings"]["float32"]["flops_per_second"] > 1e8
    assert result["machine"]["torch"] and "speed-up" in output and "inference, CRATE-tiny, batch 1, float32" in output


@pytest.mark.slow
def test_pictures_open(measured):
    _, path = measured
    pictures = sorted(path.with_suffix("").glob("*.png"))
    assert {picture.stem for picture in pictures} == {"speed", "batch", "roofline"}
    for picture in pictures:
        assert matplotlib.image.imread(picture).std() > 0.01


def test_a_part_keeps_the_other_rows():
    old, new = {"rows": [ROW, ROW | {"batch": 1}]}, {"rows": [ROW | {"ms": 5.0}]}
    assert run.merge(old, new)["rows"] == [ROW | {"ms": 5.0}, ROW | {"batch": 1}]
    assert run.merge(None, new) == new


@pytest.mark.slow
def test_a_wrong_kernel_gets_no_speed(tmp_path):
    """A copy of the project, one sign of the attention's backward kernel flipped, run in the interpreter."""
    shutil.copytree(ROOT / "crate_fast", tmp_path / "crate_fast")
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    kernel = tmp_path / "crate_fast" / "kernels" / "attention_gradient.py"
    right, wrong = "* (b_dp * scale - b_delta_i[:, None])", "* (b_dp * scale + b_delta_i[:, None])"
    source = kernel.read_text()
    assert source.count(right) == 1
    kernel.write_text(source.replace(right, wrong))
    flags = ["--device", "cpu", "--quick", "--what", "mssa both", "--batch", "1", "--backend", "triton", "--against", "sdpa"]
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    result = benchmark(*flags, "--out", str(tmp_path / "out.json"), tree=tmp_path, **environment)
    rows = {row["peer"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert "ms" in rows["published"] and "ms" in rows["sdpa"]
    assert "ms" not in rows["crate_fast"]
    error = re.fullmatch(r"no parity: gradients (\S+) from float64, .*", rows["crate_fast"]["reason"])
    assert 0.05 < float(error.group(1)) < 10
    assert result.returncode == 1


def test_crate_alpha_is_measured_with_the_work_of_its_own_layers_and_the_same_numbers():
    device = torch.device("cpu")
    with torch.device("meta"):
        layer = CRATEAlpha_large(depth=1).transformer.layers[0]
    workload = Workload("layer", "layer forward", "alpha-large", 2, "float32")
    spared = 257**2 * 1024 * 2  # half of the scores, of 2 images
    assert workload.tokens == 257
    assert floors.totals(workload.kernels())[0] == 2 * 2 * layer.flops(257) - spared
    workload = Workload("layer", "layer forward", "alpha-tiny", 1, "float32")
    measured = {peer.name: prepare(workload, peer, "eager", device) for peer in filter(workload.concerns, all_peers(device))}
    assert {*measured} == {"published", "sdpa", "crate_fast"}
    (x,) = measured["published"].inputs(1)
    for call in measured.values():
        torch.testing.assert_close(call.run(x), measured["published"].run(x))


def test_compare_tells_noise_from_change(tmp_path, capsys):
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    rows = [ROW, ROW | {"batch": 64}, ROW | {"batch": 1}]
    files[0].write_text(json.dumps({"schema": 1, "rows": rows}))
    noisy = ROW | {"batch": 64, "ms": 12.0, "ms_q1": 9.0, "ms_q3": 14.0}
    files[1].write_text(json.dumps({"schema": 1, "rows": [ROW | {"ms": 10.3, "ms_q1": 10.2, "ms_q3": 10.4}, noisy, rows[2]]}))
    assert run.main(["--compare", *map(str, files)]) == 0
    assert "3 rows compared, 0 differ" in capsys.readouterr().out
    files[1].write_text(json.dumps({"schema": 1, "rows": [ROW | {"ms": 20.0, "ms_q1": 19.0, "ms_q3": 21.0}]}))
    assert run.main(["--compare", *map(str, files)]) == 1
    output = capsys.readouterr().out
    assert "slower: inference, CRATE-tiny, batch 8, float32, crate_fast, eager: 10.00 ms to 20.00 ms" in output
    assert output.count("no longer measured") == 2
    for text in ("{}", "[]", "{", json.dumps({"schema": 2, "rows": []}), json.dumps({"schema": 1, "rows": [{}]})):
        files[0].write_text(text)
        assert run.main(["--compare", *map(str, files)]) == 2
        assert f"error: {files[0]} " in capsys.readouterr().err
    files[0].write_text(json.dumps({"schema": 1, "rows": [ROW | {"batch": 9}]}))
    assert run.main(["--compare", *map(str, files)]) == 2
    assert "no measurement in common" in capsys.readouterr().err


@pytest.mark.slow
def test_the_readme_quotes_the_results_and_nothing_else():
    text = report.README.read_text(encoding="utf-8")
    quoted = text.split(report.START)[1].split(report.END)[0].strip()
    assert quoted == report.section(run.RESULTS)
    assert "images/s" in quoted
    ratios = json.loads((run.RESULTS / "precision.json").read_text())["ratios"]["bf16"]
    assert f"| error of the logits against float64, bf16 autocast | {ratios['logits']:.2f} | 1 |" in text
    assert f"| error of the gradients (median over parameters) | {ratios['median']:.2f} | 1 |" in text
    counts = []
    for ours in (True, False):
        kernels = traffic.layer_traffic(ours, "layer")
        over_tokens = [[k for k in kernels[part] if k.name not in ("prepare", "finish")] for part in ("forward", "backward")]
        counts.append(" + ".join(str(len(found)) for found in over_tokens))
    assert f"| {counts[0]} | {counts[1]} | `python benchmarks/run.py --suite traffic` |" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--suite", "speed"], "--suite names 'speed'; allowed are ops, layer"),
        (["--model", "huge"], "--model names 'huge'; allowed are tiny"),
        (["--dtype", "int8"], "--dtype names 'int8'"),
        (["--batch", "0"], "--batch is 0"),
        (["--device", "cuda"], "no CUDA GPU"),
        (["--out", "results"], "--out is results; its name must end in .json"),
        (["--calibrate", "gpu.json"], "--calibrate is for --suite predicted"),
        (["--suite", "traffic", "--model", "alpha-tiny"], "--model is alpha-tiny; --suite traffic counts"),
    ],
)
def test_wrong_arguments_are_named(flags, words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run.main(flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_checkout_that_is_none_is_named(tmp_path, capsys):
    assert run.main(["--device", "cpu", "--published", str(tmp_path), "--out", str(tmp_path / "x.json")]) == 2
    assert "there is no" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.slow
def test_input_is_measured_beside_the_published_pipeline(tmp_path, capsys, monkeypatch):
    module = load_module(BENCHMARKS / "input.py")
    monkeypatch.setattr(module, "DISTINCT", 2)
    flags = ["--workers", "1", "--images", "300", "--rounds", "1", "--json", str(tmp_path / "input.json")]
    assert module.main(flags) == 0
    rows = {(row["what"], row["figure"]): row for row in json.loads((tmp_path / "input.json").read_text())["rows"]}
    both = {(what, figure) for what in ("published", "packed, JPEG", "packed, raw") for figure in ("batch", "full")}
    assert set(rows) == {*both, ("folder", "full"), ("packed, JPEG", "first epoch"), ("packed, raw", "first epoch")}
    assert all(row["images_per_second"] > 0 and row["per_core"] > 0 for row in rows.values())
    assert rows["packed, raw", "batch"]["per_core"] > 5 * rows["published", "batch"]["per_core"]  # some fifteen times
    assert "| packed, raw | batch | " in capsys.readouterr().out
    pixels = module.photograph(np.random.default_rng(0))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=module.best_quality(Image.fromarray(pixels)))
    assert abs(file.tell() / module.BYTES - 1) < 0.1
    with pytest.raises(SystemExit):
        module.main(["--data", str(tmp_path / "absent")])
    assert "SRC is" in capsys.readouterr().err


def test_the_docs_quote_what_the_input_gave():
    module = load_module(BENCHMARKS / "input.py")
    rows = json.loads((BENCHMARKS / "results" / "input-amd-epyc-2-threads.json").read_text())["rows"]
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert module.table(rows) in text
    speeds = {(row["what"], row["figure"]): row["images_per_second"] for row in rows}
    jpeg, raw = (speeds[f"packed, {kind}", "batch"] / speeds["published", "batch"] for kind in ("JPEG", "raw"))
    readme = " ".join(report.README.read_text(encoding="utf-8").split())
    assert f"JPEG packs give {jpeg:.1f} times as many images and raw packs {raw:.1f} times" in readme

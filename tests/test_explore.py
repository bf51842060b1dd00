"""`crate-fast explore`: a page that holds all that it shows, and shows what the library computes."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import call
from helpers.pictures import photographs

from crate_fast import CRATE
from crate_fast.checkpoint import save_model
from crate_fast.inspection import attention_row, layer_views, measure_layers
from crate_fast.inspection.photos import Normalisation, cut_to_patches, read_photo

NAME = "<img src=x onerror=alert(1)><!--<script>.jpg".replace("/", "")
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
CLICK = """<script>window.addEventListener("load", () => setTimeout(() => {
  const canvas = document.getElementById("attention"), box = canvas.getBoundingClientRect();
  const choose = (id, value, event) => Object.assign(document.getElementById(id), { value }).dispatchEvent(new Event(event));
  choose("layer", 1, "input"); choose("head", 1, "change");
  const place = { clientX: box.left + box.width * .9, clientY: box.top + box.height * .1, bubbles: true };
  canvas.dispatchEvent(new MouseEvent("click", place));
}, 100));</script>"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, two photographs, one of them with markup in its name, and a page of them."""
    folder = tmp_path_factory.mktemp("explore")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_classes": 4, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
    model = CRATE(**sizes)
    save_model(model, folder / "model.safetensors")
    save_model(CRATE(**sizes | {"depth": 0}), folder / "flat.safetensors")
    for name in ("flower.png", NAME):
        photographs()["flower" if "flower" in name else "china"].resize((64, 48)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def page(place):
    """The page's text."""
    from crate_fast.commands.main import main

    words = ["explore", str(place / "flower.png"), str(place / NAME), "--checkpoint", str(place), "--size", "40"]
    assert main([*words, "--out", str(place / "page.html")]) == 0
    return (place / "page.html").read_text(encoding="utf-8")


def seen(place, model):
    """The views of each layer of the flower as the page has it."""
    image = cut_to_patches(read_photo(place / "flower.png"), model.patch_size, 40)
    return list(layer_views(model, Normalisation(model, place)(image))), Normalisation(model, place)(image)


def test_the_page_holds_what_the_library_computes(place, page):
    from crate_fast import load_checkpoint

    model = load_checkpoint(place)
    views, image = seen(place, model)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    first = data["photos"][0]
    assert (first["rows"], first["columns"], data["depth"], data["heads"], data["width"]) == (5, 6, 2, 2, 16)
    measures = measure_layers(model, image)
    for layer, (stored, view) in enumerate(zip(first["layers"], views, strict=True)):
        raw = np.frombuffer(base64.b64decode(stored["projections"]), "<i2").astype(np.float32) * stored["scale"]
        w = torch.from_numpy(raw).view(1, 31, 32)
        for token in (0, 7):
            expected = attention_row(view.projection, 2, view.scale, token)
            torch.testing.assert_close(attention_row(w, 2, 1.0, token), expected, rtol=1e-3, atol=1e-5)
        told = [stored[name] for name in ("before", "after", "nonzero", "rate")]
        assert told == pytest.approx([float(part[layer, 0]) for part in measures], rel=1e-6)
        assert len(base64.b64decode(stored["colours"])) == 5 * 6 * 3


def test_the_page_needs_nothing_else_and_runs_nothing_that_a_file_is_called(page):
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"""(?:https?:)?//[\w.-]+\.[\w/]+""", re.sub(r'"data:[^"]*"', "", page)))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nobody calls
    assert page.count("<script") == 2
    assert "<img" not in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("{p}/flower.png --checkpoint {p} --out {p}/page.txt", "its ending must be .html or .htm"),
        ("{p}/flower.png --checkpoint {p} --out {p}/no/page.html", "lies in no directory"),
        ("{p}/flower.png --checkpoint {p}/flat.safetensors --out {p}/x.html", "the model has no layers"),
        ("{p}/flower.png --checkpoint {p} --size 3 --out {p}/x.html", "smaller than a patch"),
        ("{p}/flower.png --checkpoint {p} --size 800 --out {p}/x.html", "at most 1 are written"),
        ("{p}/absent.png --checkpoint {p} --out {p}/x.html", "absent.png: cannot be read"),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_line(place, capsys, monkeypatch, words, told):
    monkeypatch.setattr("crate_fast.inspection.explore.LARGEST", 1 << 20)
    status, out, err = call(capsys, "explore", *words.format(p=place).split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert told in err
    assert not (place / "x.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser_a_click_shows_where_a_patch_attends(place, page):
    from crate_fast import load_checkpoint

    (place / "clicked.html").write_text(page.replace("</body>", f"{CLICK}</body>"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, (place / "clicked.html").as_uri()], capture_output=True, text=True, timeout=60, check=True)
    told = re.search(r'<figcaption id="told">(.*?)</figcaption>', done.stdout)[1]
    views, _ = seen(place, load_checkpoint(place))
    row = attention_row(views[0].projection, 2, views[0].scale, token=6)[0, 1]
    assert told.startswith("Where the patch in row 1, column 6 attends, head 2 of 2; to itself ")
    assert float(re.search(r"to itself ([\d.]+)", told)[1]) == pytest.approx(100 * row[6].item(), rel=0.01)

"""CRATE-α on the Hugging Face Hub and in transformers: one folder for both, and all that CRATE's does there."""

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file
from test_transformers import EVALUATED, NAMES, WEIGHTS, Pictures, offline, photograph  # noqa: F401 (a fixture, used by itself)
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import crate_fast
from crate_fast import CRATE, CheckpointError, CRATEAlpha, load_checkpoint
from crate_fast.checkpoint import constructor_arguments
from crate_fast.transformers import (
    CrateAlphaConfig,
    CrateAlphaForImageClassification,
    CrateAlphaModel,
    CrateConfig,
    CrateForImageClassification,
)

SMALL = {"image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
OTHER = {"image_size": (16, 24), "ista": 0.2, "lambd": 0.05, "dropout": 0.1, "init_values": 0.3}


def small_model(kind=CRATEAlpha, **options):
    torch.manual_seed(0)
    model = kind(num_classes=3, **SMALL | options).eval()
    model.transform = EVALUATED
    return model


def images_of(model):
    return torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1)).to(model.cls_token.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, OTHER], ids=["plain", "other"])
@torch.no_grad()
def test_both_folders_are_one(tmp_path, options, dtype):
    model = small_model(**options).to(dtype)
    assert model.save_pretrained(tmp_path / "mixin") is None
    read = AutoModelForImageClassification.from_pretrained(tmp_path / "mixin")
    assert type(read) is CrateAlphaForImageClassification and not read.training and read.dtype == dtype
    images = images_of(model)
    logits = model(images)
    assert torch.equal(read(images).logits, logits) and read.config.id2label == dict(enumerate(NAMES))
    read.save_pretrained(tmp_path / "transformers")
    for name in (WEIGHTS, "preprocessor_config.json"):
        assert (tmp_path / "mixin" / name).read_bytes() == (tmp_path / "transformers" / name).read_bytes()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("mixin", "transformers")]
    assert configs[0] == {name: configs[1][name] for name in configs[0]}
    assert (configs[0]["model_type"], configs[0]["model"]) == ("crate_alpha", "CRATEAlpha")
    for load in (load_checkpoint, CRATE.from_pretrained, CRATEAlpha.from_pretrained):
        again = load(tmp_path / "transformers")
        assert type(again) is CRATEAlpha and torch.equal(again(images), logits) and again.transform == EVALUATED
        assert constructor_arguments(again) == constructor_arguments(model)
    features = AutoModel.from_pretrained(tmp_path / "transformers")
    assert type(features) is CrateAlphaModel
    torch.testing.assert_close(model.mlp_head(features(images).pooler_output), logits)


def test_the_card_is_of_crate_alpha_and_what_is_pushed_is_read_by_its_name(tmp_path, monkeypatch):
    """The Hub itself played by a folder."""
    from huggingface_hub import HfApi, RepoUrl

    def upload(self, *, folder_path, repo_id, **_):
        tmp_path.joinpath("stored").mkdir()
        for file in list(type(tmp_path)(folder_path).iterdir()):
            (tmp_path / "stored" / file.name).write_bytes(file.read_bytes())
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = small_model(**OTHER)
    assert model.push_to_hub("somebody/alpha") == "https://huggingface.co/somebody/alpha/commit/1"
    card = (tmp_path / "stored" / "README.md").read_text()
    assert "# CRATEAlpha, 2 layers of width 32" in card and "from crate_fast import CRATEAlpha" in card
    assert "2405.20299" in card and "2306.01129" not in card and "crate-alpha" in card and "| `init_values` | `0.3` |" in card
    monkeypatch.setattr(crate_fast.checkpoint.hub, "hf_hub_download", lambda name, file, **_: str(tmp_path / "stored" / file))
    assert torch.equal(CRATEAlpha.from_pretrained("somebody/alpha").cls_token, model.cls_token)


@torch.no_grad()
def test_weights_that_another_tool_wrote_are_what_config_json_beside_them_says(tmp_path, capsys):
    model = small_model(**OTHER)
    images = images_of(model)
    CrateAlphaForImageClassification.from_crate(model).save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / WEIGHTS).exists() and len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(load_checkpoint(tmp_path)(images), model(images))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    save_file(model.state_dict(), tmp_path / WEIGHTS)  # our metadata are gone
    del config["model"]
    (tmp_path / "config.json").write_text(json.dumps(config))  # transformers' word alone is enough
    for load in (load_checkpoint, lambda path: AutoModelForImageClassification.from_pretrained(path).to_crate()):
        assert torch.equal(load(tmp_path)(images), model(images))
    assert capsys.readouterr().err == ""
    small_model(CRATE).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | SMALL))
    with pytest.raises(CheckpointError, match=r"model is 'CRATE' by its metadata and 'CRATEAlpha' by config\.json"):
        load_checkpoint(tmp_path)


def test_a_new_head_a_pipeline_and_a_trainer_are_as_for_crate(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "hub")
    photograph().save(tmp_path / "photo.png")
    with torch.no_grad():
        loaded, transform, names = crate_fast.load(tmp_path / "hub")
        expected = loaded(transform(tmp_path / "photo.png")[None]).softmax(-1)[0]
    for each in pipeline("image-classification", model=str(tmp_path / "hub"))(str(tmp_path / "photo.png")):
        assert each["score"] == pytest.approx(expected[names.index(each["label"])].item(), abs=1e-6)
    new = AutoModelForImageClassification.from_pretrained(tmp_path / "hub", num_labels=4, ignore_mismatched_sizes=True)
    own, weights = model.state_dict(), new.state_dict()
    assert {name for name in own if not torch.equal(own[name], weights[name])} == {"mlp_head.1.weight", "mlp_head.1.bias"}
    settings = dict(use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=8, learning_rate=1e-3, seed=0)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hub")
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=3, save_steps=3, logging_steps=1, **settings)
    trainer = Trainer(model=new, args=arguments, train_dataset=Pictures(), processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    images = Pictures().images
    with torch.no_grad():
        again = load_checkpoint(tmp_path / "run" / "checkpoint-3")
        assert type(again) is CRATEAlpha and torch.equal(again(images), new.eval()(images).logits)


def test_what_a_file_has_not_is_drawn_as_the_constructor_draws_it(tmp_path):
    model = small_model(init_values=0.3)
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    drawn = ["conv1.weight", "transformer.layers.1.1.fn.D", "transformer.layers.0.0.scale", "cls_token", "mlp_head.0.weight"]
    with torch.no_grad():
        for name in weights:
            weights[name].fill_(0.125)
    save_file({name: value for name, value in weights.items() if name not in drawn}, tmp_path / WEIGHTS, {"format": "pt"})
    read = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    fresh = small_model(init_values=0.3).state_dict()
    assert all((read[name] == 0.125).all() for name in set(read) - set(drawn))
    for name in drawn:
        assert read[name].std(correction=0).item() == pytest.approx(fresh[name].std(correction=0).item(), rel=0.3, abs=1e-9)
    assert (read[drawn[2]] == 0.3).all() and (read[drawn[4]] == 1).all()


def test_configurations_are_of_one_member(tmp_path):
    defaults = {name: each.default for name, each in inspect.signature(CRATEAlpha).parameters.items()}
    own = constructor_arguments(crate_fast.CRATEAlpha_tiny())
    expected = {name: own.get(name, default) for name, default in defaults.items()} | {"image_size": 224, "patch_size": 16}
    assert CrateAlphaConfig().arguments() == expected
    config = CrateAlphaConfig(num_classes=2, backend="reference", init_values=0.1, **SMALL)
    config.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["num_classes"] == 2 and not {"backend", "pool", "step", "stream"} & set(said)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CrateAlphaConfig
    made = AutoModelForImageClassification.from_config(config)
    assert made.mlp_head[1].out_features == 2 and made.transformer.backend == "reference" and made.init_values == 0.1
    assert isinstance(AutoModel.from_config(config).get_input_embeddings(), nn.Conv2d)
    plain = small_model(drop_path=0.5)
    theirs = CrateAlphaForImageClassification.from_crate(plain)
    back = theirs.to_crate()
    assert theirs.cls_token is back.cls_token is plain.cls_token and type(back) is CRATEAlpha
    assert [model.transformer.layers[-1].drop_path for model in (theirs, back)] == [0.5, 0.5]
    with pytest.raises(ValueError, match="model is 'CRATEAlpha'; it must be 'CRATE' in a CrateConfig"):
        CrateForImageClassification.from_crate(plain)
    with pytest.raises(ValueError, match="model is 'CRATE'; it must be 'CRATEAlpha' in a CrateAlphaConfig"):
        CrateAlphaForImageClassification.from_crate(small_model(CRATE))
    with pytest.raises(ValueError, match="it must be 'CRATE' in a CrateConfig"):
        CrateConfig(model="CRATEAlpha")
    for kind, other in ((CRATEAlpha, CrateForImageClassification), (CRATE, CrateAlphaForImageClassification)):
        small_model(kind).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"this config\.json is of a {kind.__name__}, and no {other.built_as.__name__}"):
            other.from_pretrained(tmp_path)

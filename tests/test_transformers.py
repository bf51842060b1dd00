"""crate_fast.transformers with the library itself, offline: Auto classes, pipeline, processor, Trainer, one folder for both."""

import importlib
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
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
import crate_fast.modules.layer
import crate_fast.transformers
from crate_fast import CRATE, CheckpointError, load_checkpoint
from crate_fast.checkpoint import constructor_arguments
from crate_fast.errors import MissingPackageError
from crate_fast.eval_transform import Transform
from crate_fast.transformers import CrateConfig, CrateForImageClassification, CrateImageProcessor, CrateModel

SMALL = {"image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
WIDE = {"image_size": (16, 24), "pool": "mean", "ista": 0.2, "lambd": 0.05, "dropout": 0.1}
NAMES = ("cat", "dog", "owl")
EVALUATED = Transform(0.8, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), NAMES)
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is asked of the Hub, and nothing is said."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "disabled", True)


def small_model(transform=EVALUATED, **options):
    torch.manual_seed(0)
    model = CRATE(num_classes=3, **SMALL | options).eval()
    model.transform = transform
    return model


def classifier(**options):
    torch.manual_seed(0)
    return CrateForImageClassification(CrateConfig(num_classes=3, **SMALL | options))


def photograph(width=50, height=40, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, WIDE], ids=["square", "wide"])
def test_both_folders_are_one(tmp_path, options, dtype):
    model = small_model(**options).to(dtype)
    images = torch.randn(2, 3, *model.image_size).to(dtype)
    model.save_pretrained(tmp_path / "mixin")
    with torch.no_grad():
        logits = model(images)
        read = AutoModelForImageClassification.from_pretrained(tmp_path / "mixin")
        assert type(read) is CrateForImageClassification and not read.training and read.dtype == dtype
        assert torch.equal(read(images).logits, logits)
        assert read.config.id2label == dict(enumerate(NAMES)) and read.config.label2id["owl"] == 2
        read.save_pretrained(tmp_path / "transformers")
        for name in (WEIGHTS, "preprocessor_config.json"):
            assert (tmp_path / "mixin" / name).read_bytes() == (tmp_path / "transformers" / name).read_bytes()
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("mixin", "transformers")]
        assert configs[0] == {name: configs[1][name] for name in configs[0]}
        for load in (load_checkpoint, CRATE.from_pretrained):
            again = load(tmp_path / "transformers")
            assert torch.equal(again(images), logits) and again.transform == EVALUATED
            assert constructor_arguments(again) == constructor_arguments(model)


def test_weights_without_our_metadata_are_what_config_json_says_to_both(tmp_path):
    model = classifier(**WIDE).eval()
    images = torch.randn(2, 3, 16, 24)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / WEIGHTS).exists() and len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        for load in (load_checkpoint, CRATE.from_pretrained):
            assert torch.equal(load(tmp_path)(images), model(images).logits)
        assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path)(images).logits, model(images).logits)


def test_a_processor_of_the_users_own_stays_where_it_makes_the_models_images(tmp_path):
    own = CrateImageProcessor(size=16, crop_pct=0.5, image_mean=[0.5] * 3, image_std=[0.1] * 3)
    for size, crop in ((16, 0.5), (24, 0.8)):
        own.save_pretrained(tmp_path)
        CrateForImageClassification.from_crate(small_model(image_size=size)).save_pretrained(tmp_path)
        found = AutoImageProcessor.from_pretrained(tmp_path)
        assert (found.size["height"], found.crop_pct) == (size, crop)


def test_what_was_saved_last_in_a_folder_is_what_is_read(tmp_path):
    images = torch.randn(2, 3, 16, 16)
    for size in ("20KB", "1GB", "20KB", None):
        model = classifier(ista=torch.rand(()).item()).eval()
        nn.init.normal_(model.cls_token)
        if size is None:
            model.to_crate().save_pretrained(tmp_path)
        else:
            model.save_pretrained(tmp_path, max_shard_size=size)
        with torch.no_grad():
            logits = model(images).logits
            assert torch.equal(load_checkpoint(tmp_path)(images), logits)
            assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path)(images).logits, logits)


def test_a_pipeline_says_what_crate_fast_says(tmp_path):
    small_model().save_pretrained(tmp_path / "hub")
    photograph().save(tmp_path / "photo.png")
    model, transform, names = crate_fast.load(tmp_path / "hub")
    with torch.no_grad():
        expected = model(transform(tmp_path / "photo.png")[None]).softmax(-1)[0]
    found = pipeline("image-classification", model=str(tmp_path / "hub"))(str(tmp_path / "photo.png"))
    assert {each["label"] for each in found} == set(names)
    for each in found:
        assert each["score"] == pytest.approx(expected[names.index(each["label"])].item(), abs=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", [0.0, 0.875, 1.0])
def test_the_processor_makes_the_same_pixels_to_the_bit(tmp_path, crop, channels):
    for transform in (Transform(crop), Transform(crop, (0.1,) * channels, (0.7,) * channels)):
        small_model(transform, channels=channels, **WIDE).save_pretrained(tmp_path)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        ours = crate_fast.load(tmp_path).transform
        for size in ((50, 40), (17, 90), (16, 24)):
            for mode in ("RGB", "L", "RGBA"):
                image = photograph(*size, mode)
                assert torch.equal(processor(image, return_tensors="pt").pixel_values[0], ours(image))
        image = photograph()
        image.save(tmp_path / "photo.png")
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        given = [str(tmp_path / "photo.png"), image, array, np.moveaxis(array, -1, 0), tensor, tensor[None]]
        for each in given:
            assert torch.equal(processor(each, return_tensors="pt")["pixel_values"][0], ours(image))
        assert processor([image, array], return_tensors="np")["pixel_values"].shape == (2, channels, 16, 24)
        again = CrateImageProcessor.from_config(AutoConfig.from_pretrained(tmp_path))
        assert again.to_dict() == processor.to_dict()


def test_the_processor_leaves_out_what_it_is_told_to_and_refuses_what_it_cannot():
    processor = CrateImageProcessor(size={"height": 16, "width": 16}, crop_pct=1.0)
    image = photograph(16, 16)
    plain = dict(return_tensors="pt", do_resize=False, do_normalize=False)
    bytes_ = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.equal(processor(image, do_rescale=False, **plain).pixel_values[0], bytes_.float())
    assert torch.equal(processor(image, rescale_factor=0.5, **plain).pixel_values[0], bytes_ * 0.5)
    assert torch.equal(processor(image, image_mean=None, crop_pct=None, **plain).pixel_values[0], bytes_ / 255)
    half = dict(return_tensors="pt", size=16, crop_pct=1, image_mean=0.5, image_std=0.5)
    assert torch.equal(processor(image, **half).pixel_values[0], (bytes_ / 255 - 0.5) / 0.5)
    # What is no byte stays what it is: no rounding to one of 256 values.
    values = torch.rand(3, 50, 40)
    assert torch.equal(processor(values, do_rescale=False, **plain).pixel_values[0], values)
    scaled = processor(values * 255, return_tensors="pt", do_normalize=False).pixel_values[0]
    expected = processor((values * 255).round().to(torch.uint8), return_tensors="pt", do_normalize=False).pixel_values[0]
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1.5 / 255)
    wrong = {"crop_pct": 0.01, "resample": 3, "do_center_crop": True, "do_pad": True, "size": {"shortest_edge": 16}}
    for name, value in (wrong | {"image_mean": [0.5, 0.5]}).items():
        with pytest.raises(ValueError, match=name):
            processor(image, **{name: value})
    with pytest.raises(ValueError, match="too long"):
        processor(Image.new("RGB", (1_000_000, 1)))


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # of parameters that are in no submodule
def test_dtype_backend_and_device_map_are_as_asked_for(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    load = AutoModelForImageClassification.from_pretrained
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for name in ("dtype", "torch_dtype"):
            half = load(tmp_path, **{name: torch.bfloat16})
            assert half.dtype == torch.bfloat16
            assert torch.equal(half(images).logits, small_model().bfloat16()(images.bfloat16()))
        assert load(tmp_path, backend="reference").transformer.backend == "reference"
        for place in ("cpu", "auto"):
            assert torch.equal(load(tmp_path, device_map=place)(images).logits, model(images))
        parts = dict.fromkeys(("to_patch_embedding", "pos_embedding", "cls_token", "dropout", "to_latent", "mlp_head"), "cpu")
        there = load(tmp_path, device_map=parts | {"transformer": "disk"}, offload_folder=str(tmp_path / "off"))
        torch.testing.assert_close(there(images).logits, model(images))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_loaded_is_computed_as_crate_is(tmp_path, backend, monkeypatch):
    calls = []
    for name in ("crate_fast.modules.layer.evaluated_layer", "crate_fast.kernels.fused_layer"):
        module, _, function = name.rpartition(".")
        module = importlib.import_module(module)
        monkeypatch.setattr(module, function, counted(getattr(module, function), calls))
    plain = small_model(backend=backend)
    plain.save_pretrained(tmp_path)
    images, done = torch.randn(2, 3, 16, 16), []
    for model in (plain, AutoModelForImageClassification.from_pretrained(tmp_path, backend=backend)):
        with torch.no_grad():
            out = model(images)
        done.append((list(calls), getattr(out, "logits", out)))
        calls.clear()
    assert done[0][0] == done[1][0] != [] and torch.equal(done[0][1], done[1][1])


def counted(function, calls):
    def call(*arguments, **options):
        calls.append(function.__name__)
        return function(*arguments, **options)

    return call


def test_another_number_of_classes_is_a_new_head_and_all_else_the_same(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "hub")
    new = AutoModelForImageClassification.from_pretrained(tmp_path / "hub", num_labels=7, ignore_mismatched_sizes=True)
    own, weights = model.state_dict(), new.state_dict()
    assert {name for name in own if not torch.equal(own[name], weights[name])} == {"mlp_head.1.weight", "mlp_head.1.bias"}
    bound = SMALL["dim"] ** -0.5  # of PyTorch's own draw, which is CRATE's
    assert 0.8 * bound < weights["mlp_head.1.weight"].abs().max() <= bound
    new.config.id2label = {label: f"kind {label}" for label in range(7)}
    new.save_pretrained(tmp_path / "new")
    _, _, names = crate_fast.load(tmp_path / "new")
    assert names == tuple(new.config.id2label.values())
    named = AutoConfig.from_pretrained(tmp_path / "new")
    assert named.num_labels == named.num_classes == 7 and named.id2label[6] == "kind 6"
    new.config.id2label = {label: f"LABEL_{label}" for label in range(7)}  # which is transformers' word for no names
    new.save_pretrained(tmp_path / "new")
    assert load_checkpoint(tmp_path / "new").transform == EVALUATED._replace(names=None)


def test_features_are_what_the_head_reads(tmp_path):
    for options in ({}, WIDE):
        model = small_model(**options)
        model.save_pretrained(tmp_path / "hub")
        features = AutoModel.from_pretrained(tmp_path / "hub")
        assert type(features) is CrateModel
        images = torch.randn(2, 3, *model.image_size)
        with torch.no_grad():
            out = features(images, output_hidden_states=True)
            assert out.last_hidden_state.shape == (2, model.pos_embedding.shape[1], 32) and len(out.hidden_states) == 3
            torch.testing.assert_close(model.mlp_head(out.pooler_output), model(images))
            torch.testing.assert_close(features(images).last_hidden_state, out.hidden_states[-1])
            torch.testing.assert_close(features(images, return_dict=False)[1], out.pooler_output)
            states = AutoModelForImageClassification.from_pretrained(tmp_path / "hub")(images, output_hidden_states=True)
            torch.testing.assert_close(states.hidden_states[-1], out.last_hidden_state)
        with pytest.raises(ValueError, match="output_attentions is True"):
            features(images, output_attentions=True)
    features.save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match="'mlp_head"):
        load_checkpoint(tmp_path / "headless")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "headless")
    assert torch.equal(again.cls_token, model.cls_token) and torch.equal(again.mlp_head[0].weight, torch.ones(32))


def test_a_new_model_is_drawn_as_crate_is_and_shares_its_weights_where_asked():
    torch.manual_seed(0)
    plain = CRATE(num_classes=3, drop_path=0.5, stream="float32", **SMALL)
    drawn = classifier()
    assert drawn.training and all(torch.equal(a, b) for a, b in zip(plain.parameters(), drawn.parameters(), strict=True))
    plain.transform = EVALUATED
    plain.cls_token.requires_grad_(False)
    theirs = CrateForImageClassification.from_crate(plain.eval())
    back = theirs.to_crate()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(theirs(images).logits, plain(images)) and torch.equal(back(images), plain(images))
    assert not plain.cls_token.requires_grad and plain.pos_embedding.requires_grad
    for model in (theirs, back):
        assert model.transformer.stream == "float32" and model.transformer.layers[-1].drop_path == 0.5
    assert theirs.cls_token is back.cls_token is plain.cls_token and type(back) is CRATE
    assert theirs.config.id2label[1] == "dog" and back.transform == EVALUATED and not (theirs.training or back.training)
    plain.mlp_head = nn.Identity()
    with pytest.raises(ValueError, match="changed after it was built"):
        CrateForImageClassification.from_crate(plain)
    theirs.mlp_head[1] = nn.Identity()
    with pytest.raises(ValueError, match="changed after it was built"):
        theirs.save_pretrained("nowhere")


class Pictures(torch.utils.data.Dataset):
    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.images, self.labels = torch.randn(8, 3, 16, 16, generator=draw), torch.arange(8) % 3

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def test_trainer_trains_saves_and_goes_on(tmp_path):
    losses = {}
    for checkpointed in (False, True):
        options = dict(
            per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=2, logging_steps=1, learning_rate=1e-3
        )
        options |= dict(use_cpu=True, report_to=[], disable_tqdm=True, activation_checkpointing=checkpointed, seed=0)
        model = classifier()
        start = model(**torch.utils.data.default_collate(list(Pictures()))).loss.item()
        folder = str(tmp_path / str(checkpointed))
        trainer = Trainer(
            model=model,
            args=TrainingArguments(folder, max_steps=4, **options),
            train_dataset=Pictures(),
            processing_class=CrateImageProcessor.from_config(model.config),
        )
        trainer.train()
        losses[checkpointed] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == losses[False] and losses[True][-1] < start
    assert abs(losses[True][0] - start) < 1  # a mean over what is accumulated, not its sum
    assert model.gradient_checkpointing and model.transformer.grad_checkpointing
    saved = tmp_path / "True" / "checkpoint-4"
    assert AutoImageProcessor.from_pretrained(saved).size["height"] == 16
    images = Pictures().images
    with torch.no_grad():
        assert torch.equal(load_checkpoint(saved)(images), model.eval()(images).logits)
    trainer = Trainer(model=classifier(), args=TrainingArguments(folder, max_steps=6, **options), train_dataset=Pictures())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and trainer.state.log_history[-1]["train_loss"] < losses[True][-1]
    with pytest.raises(ValueError, match="every_n_layers is 2"):
        model.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="offload is True"):
        model.activation_checkpointing_enable(offload=True)


def test_what_is_pushed_is_what_is_saved(tmp_path, monkeypatch):
    """The Hub itself played by a folder."""
    from huggingface_hub import HfApi, RepoUrl

    pushed = {}

    def upload(self, repo_id, operations, **_):
        for operation in operations:
            with operation.as_file() as file:
                pushed[operation.path_in_repo] = file.read()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "create_commit", upload)
    CrateForImageClassification.from_crate(small_model()).save_pretrained(tmp_path, push_to_hub=True, repo_id="somebody/crate")
    for name in (WEIGHTS, "config.json", "preprocessor_config.json"):
        assert pushed[name] == (tmp_path / name).read_bytes()
    assert b"white-box" in pushed["README.md"]


def test_configurations_keep_what_they_are_told_and_a_runs_is_refused(tmp_path):
    assert CrateConfig().arguments() == inspect_arguments(CRATE)
    assert (CrateConfig(num_labels=4).num_classes, CrateConfig(id2label={0: "x", 1: "y"}).num_classes) == (4, 2)
    config = CrateConfig(num_classes=2, backend="reference", **SMALL)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_channels) == (32, 2, 2, 3)
    config.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["num_classes"] == 2 and not {"backend", "stream", "id2label"} & set(said)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 2
    assert AutoModelForImageClassification.from_config(config).mlp_head[1].out_features == 2
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "resolved": {}}))
    with pytest.raises(ValueError, match=r"config\.json is a run's"):
        CrateForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its evaluation is"):
        CrateConfig(evaluation={"crop": 7})


def inspect_arguments(kind):
    """The defaults of CRATE-tiny and those of the constructor."""
    import inspect

    defaults = {name: each.default for name, each in inspect.signature(kind).parameters.items()}
    own = constructor_arguments(crate_fast.CRATE_tiny())
    return {name: own.get(name, default) for name, default in defaults.items()} | {"image_size": 224, "patch_size": 16}


def test_without_transformers_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("crate_fast.optional.find_spec", lambda name: None if name == "transformers" else name)
    with pytest.raises(MissingPackageError, match=r"^this needs transformers: pip install 'crate-fast\[transformers\]'$"):
        importlib.reload(crate_fast.transformers)
    monkeypatch.undo()
    importlib.reload(crate_fast.transformers)  # a second time: what is registered is registered again

"""CRATE and CRATE-α as models of transformers: their own modules under their own names, so that the files are the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import PushToHubMixin

from ..backend import check_tensor
from ..checkpoint.constructor import PUBLISHED_MODEL, constructor_arguments, skeleton
from ..checkpoint.hub_config import PREPROCESSOR_NAME, preprocessor_config, write_json
from ..checkpoint.save_load import described, transform_entry
from ..checkpoint.tensor_files import INDEX_NAME, MODEL_NAME, read_tensors, write_tensors
from ..files import parse_json
from ..model.alpha import CRATEAlpha
from ..model.crate import CRATE
from ..model.transformer import layers_of, pool_tokens
from ..modules.layer import ScaledPreNorm
from ..modules.step import SparseStep
from .configuration import CrateAlphaConfig, CrateConfig, FamilyConfig

if TYPE_CHECKING:
    from typing_extensions import Self

OF_UPLOADS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
HEAD = r"^mlp_head\."
DRAWN = (nn.Linear, nn.Conv2d, nn.LayerNorm, ScaledPreNorm, SparseStep)  # modules with weights of their own, but the model


class _Unbuilt(CRATE):
    """A CRATE that is built when transformers' own constructor, which calls this one without arguments, has done its part."""

    push_to_hub = PushToHubMixin.push_to_hub  # pyright: ignore[reportAssignmentType] (which transformers' own calls as super's)

    def __init__(self) -> None:
        nn.Module.__init__(self)


class CratePreTrainedModel(PreTrainedModel, _Unbuilt):  # pyright: ignore[reportIncompatibleMethodOverride] (from_pretrained)
    """What both models share: how they are built, drawn, checkpointed in training, and saved."""

    config: FamilyConfig
    config_class = CrateConfig
    built_as: type[CRATE] = CRATE
    base_model_prefix = "crate"  # which no module is called: a classifier's modules are those of the model without a head
    main_input_name = "pixel_values"
    input_modalities = "image"
    model_tags = ["crate", "white-box"]  # noqa: RUF012 (transformers' own, as the next)
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _input_embed_layer = "to_patch_embedding"
    accepts_loss_kwargs = False  # the loss is the mean over a batch: Trainer divides it by the steps that it accumulates

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__(config)
        self.built_as.__init__(self, **config.arguments())
        self.transform = config.transform()

    def init_weights(self) -> None:
        """Nothing more: the constructor has drawn them, as `crate_fast.CRATE` does of the same seed."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws what a file did not have, each as the constructor does; what was loaded stays, as transformers marks it."""
        if module is self:
            for parameter in (self.pos_embedding, self.cls_token):
                initialization.normal_(parameter)
        elif isinstance(module, DRAWN):
            module.reset_parameters()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """As `set_grad_checkpointing`; raises ValueError where more is asked for than that."""
        if enable and every_n_layers != 1:
            raise ValueError(f"every_n_layers is {every_n_layers}; it must be 1, as all layers of a CRATE are checkpointed")
        if enable and getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            raise ValueError("offload is True; what a checkpointed CRATE keeps stays where it is")
        self.gradient_checkpointing = enable
        self.set_grad_checkpointing(enable)

    def _fitting(self, pixel_values: Tensor | None, output_attentions: bool | None) -> Tensor:
        """The images in the model's dtype, as transformers' models take them."""
        images = cast("Tensor", pixel_values)
        check_tensor("pixel_values", images)
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is True; fused layers have none: crate_fast.inspection computes them")
        return images.to(self.cls_token.dtype)

    def _states(self, images: Tensor, asked: bool | None) -> tuple[Tensor, ...] | None:
        """What enters the first layer and what every layer makes of it, each (batch, 1 + patches, dim); None unless asked."""
        if not (self.config.output_hidden_states if asked is None else asked):
            return None
        self._check_image(images)
        states = [self._embed(images)]
        for layer in self.transformer.layers:
            states.append(self.transformer.run(states[-1], None, (layer,)))
        return tuple(states)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] (transformers' and CRATE's have one name)
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **options,
    ) -> None:
        """Writes config.json, the weights and, where there is none yet for such images, preprocessor_config.json to a folder.

        The weights of a classifier in one file say themselves what they are, as those of `CRATE.save_pretrained`.

        Args: of `transformers.PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: the model was changed after it was built, so that it could not be built again.
            OSError: `save_directory` cannot be written to.
        """
        upload = {name: options.pop(name) for name in OF_UPLOADS if push_to_hub and name in options}
        # Adapters and quantised weights are written as transformers has them.
        whole = not getattr(self, "_hf_peft_config_loaded", False) and getattr(self, "hf_quantizer", None) is None
        if whole:
            self._settle_config()
        folder = Path(save_directory)
        before = _written(folder)
        super().save_pretrained(save_directory, is_main_process, state_dict, **options)
        if whole and is_main_process:
            self._describe_files(folder, {name for name, when in _written(folder).items() if before.get(name) != when})
        if push_to_hub and is_main_process:
            self.push_to_hub(upload.pop("repo_id", folder.absolute().name), **upload)

    def _settle_config(self) -> None:
        """Makes the configuration what the model is."""

    def _describe_files(self, folder: Path, written: set[str]) -> None:
        """Completes a folder in which the files of weights called so were `written`, and removes what was there before them."""
        for name in (INDEX_NAME, MODEL_NAME):
            if written and name not in written:  # read before what was written, or never again
                (folder / name).unlink(missing_ok=True)
        images = preprocessor_config(self.image_size, self.channels, self.config.transform())
        if images is not None and not _makes(folder / PREPROCESSOR_NAME, images):
            write_json(folder / PREPROCESSOR_NAME, images)


class CrateModel(CratePreTrainedModel):
    """CRATE without its head: images to tokens.

    Called with `pixel_values`, (batch, channels, height, width), it gives `last_hidden_state`, (batch, 1 + patches, dim), all
    tokens as the last layer makes them; `pooler_output`, (batch, dim), what a head reads of them, the class token or the mean;
    with `output_hidden_states=True` `hidden_states`, depth + 1 of the former: what enters the first layer and leaves each.

    Args:
        config: of whose `num_labels` nothing is made.

    Raises: as `crate_fast.CRATE`; in a call ValueError with `output_attentions=True`.
    """

    _keys_to_ignore_on_load_unexpected = [HEAD]  # noqa: RUF012

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__(config)
        del self.mlp_head
        self.post_init()

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a model of transformers)
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        images = self._fitting(pixel_values, output_attentions)
        states = self._states(images, output_hidden_states)
        tokens = self._features(images, None) if states is None else states[-1]
        pooled = self.to_latent(pool_tokens(tokens, self.pool))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled, hidden_states=cast("Any", states))


class CrateForImageClassification(CratePreTrainedModel):
    """CRATE with its head, computed as `crate_fast.CRATE` computes it.

    Called with `pixel_values`, (batch, channels, height, width), it gives `logits`, (batch, num_labels); with `labels`,
    (batch,) of int64 or as transformers' `problem_type` has them, `loss`; with `output_hidden_states=True` `hidden_states` as
    `CrateModel` does.

    Args:
        config: what it is.

    Raises: as `crate_fast.CRATE`; in a call ValueError with `output_attentions=True`.
    """

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.post_init()

    @classmethod
    def from_crate(cls, model: CRATE) -> Self:
        """`model` for transformers, in its mode; both share their weights.

        Raises:
            ValueError: it was changed after it was built, or is of another member of the family.
        """
        arguments, kind = {"model": PUBLISHED_MODEL} | described(model)[0], cast("type[FamilyConfig]", cls.config_class)
        with torch.device("meta"):
            own = cls(kind(**arguments, **_computation(model), **transform_entry(model)))
        return _share(model, own)

    def to_crate(self) -> CRATE:
        """The plain `crate_fast.CRATE`, or `CRATEAlpha`, in this one's mode; both share their weights."""
        own = skeleton(constructor_arguments(self) | _computation(self))
        own.transform = self.config.transform()
        return _share(self, own)

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a model of transformers)
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput:
        images = self._fitting(pixel_values, output_attentions)
        states = self._states(images, output_hidden_states)
        pooled = self._features(images, self.pool) if states is None else pool_tokens(states[-1], self.pool)
        logits = self._classify(pooled)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=cast("Any", states))

    def _settle_config(self) -> None:
        for name, value in constructor_arguments(self).items():
            if name in self.config.keywords and (name != "num_classes" or value != self.config.num_labels):
                setattr(self.config, name, value)

    def _describe_files(self, folder: Path, written: set[str]) -> None:
        super()._describe_files(folder, written)
        if MODEL_NAME in written:
            self.transform = self.config.transform()
            path = folder / MODEL_NAME
            write_tensors(path, read_tensors(path)[1], constructor_arguments(self) | transform_entry(self))


class CrateAlphaModel(CrateModel, CRATEAlpha):  # pyright: ignore[reportIncompatibleMethodOverride] (as of CratePreTrainedModel)
    """`CrateModel` of a CRATE-α."""

    config_class = CrateAlphaConfig
    built_as = CRATEAlpha
    _input_embed_layer = "conv1"


class CrateAlphaForImageClassification(  # pyright: ignore[reportIncompatibleMethodOverride] (as of CratePreTrainedModel)
    CrateForImageClassification, CRATEAlpha
):
    """`CrateForImageClassification` of a CRATE-α."""

    config_class = CrateAlphaConfig
    built_as = CRATEAlpha
    _input_embed_layer = "conv1"


def _written(folder: Path) -> dict[str, tuple[int, int]]:
    """When, by its name, which weights in a folder were written; only those that are read without a variant's name."""
    found = {name: folder / name for name in (MODEL_NAME, INDEX_NAME)}
    return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in found.items() if path.is_file()}


def _makes(path: Path, images: dict) -> bool:
    """Whether a preprocessor_config.json, perhaps with settings of the user's own, makes images of this size and channels."""
    try:
        found = parse_json(path.read_bytes())
        return found["size"] == images["size"] and len(found["image_mean"]) == len(images["image_mean"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _computation(model: CRATE) -> dict[str, Any]:
    """The arguments of `model` that no file has."""
    transformer = model.transformer
    drop_path = max((layer.drop_path for layer in layers_of(transformer)), default=0.0)
    found = {"backend": transformer.backend, "drop_path": drop_path}
    return found if isinstance(model, CRATEAlpha) else found | {"stream": transformer.stream}


def _share(model: CRATE, own: Any) -> Any:
    """`own`, made without memory, with the weights of `model`, trained or not as they are, and in its mode."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    learned = {name: weight.requires_grad for name, weight in weights.items()}
    own.load_state_dict(weights, assign=True)
    for name, weight in weights.items():
        weight.requires_grad_(learned[name])
    return own.train(model.training)

"""Models on the Hugging Face Hub, through huggingface_hub's mixin; imported only where the Hub is asked for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..files import first_line
from ..model.crate import CRATE
from .constructor import PUBLISHED_MODEL
from .hub_config import CONFIG_NAME, ON_HUB, PREPROCESSOR_NAME, on_hub, preprocessor_config, write_json
from .read import CheckpointError, in_directory
from .save_load import constructor_arguments, load_file, save_model, transform_entry
from .tensor_files import INDEX_NAME, MODEL_NAME, shards_of

CARD = """---
{{ card_data }}
---

# {{ model }}, {{ depth }} layers of width {{ dim }}

A white-box vision transformer ([{{ title }}]({{ paper_url }})) for images of
{{ image_size[0] }}×{{ image_size[1] }} pixels in patches of {{ patch_size[0] }}×{{ patch_size[1] }}, {{ channels }} channel(s),
{{ num_classes }} classes, {{ heads }} heads of width {{ dim_head }}: {{ parameters }} parameters.

```python
from crate_fast import {{ model }}

model = {{ model }}.from_pretrained("{{ repo_id | default("ORGANISATION/NAME", true) }}")
```

or, of transformers:

```python
import crate_fast.transformers
from transformers import pipeline

classify = pipeline("image-classification", model="{{ repo_id | default("ORGANISATION/NAME", true) }}")
```

`model.safetensors` has the weights under the names of the published class, and the constructor's arguments in its metadata.

| argument | value |
|---|---|
{% for name, value in arguments.items() %}| `{{ name }}` | `{{ value }}` |
{% endfor %}"""


class HubModel(
    ModelHubMixin,
    library_name="crate-fast",
    license="mit",
    pipeline_tag="image-classification",
    paper_url=ON_HUB["CRATE"].paper,
    tags=["crate", "white-box"],
    model_card_template=CARD,
):
    """A CRATE as huggingface_hub sees it: what `CRATE.save_pretrained`, `from_pretrained` and `push_to_hub` call."""

    def __init__(self, model: CRATE) -> None:
        self.model = model

    def _save_pretrained(self, save_directory: Path) -> None:
        model = self.model
        save_model(model, save_directory / MODEL_NAME)
        arguments = constructor_arguments(model)
        write_json(save_directory / CONFIG_NAME, arguments | transform_entry(model) | on_hub(arguments).entries())
        images = preprocessor_config(model.image_size, model.channels, model.transform)
        if images is not None:
            write_json(save_directory / PREPROCESSOR_NAME, images)

    @classmethod
    def from_pretrained(cls, source: str, **options) -> HubModel:  # pyright: ignore[reportIncompatibleMethodOverride] (its name)
        """As the mixin's, which would ask the Hub for config.json first, for many seconds where the Hub cannot be reached."""
        return cls._from_pretrained(model_id=source, **options)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, device: str = "cpu", overrides: dict | None = None, kind: type[CRATE] = CRATE, **where
    ) -> HubModel:
        folder = Path(model_id)
        path = (in_directory(folder) or folder / MODEL_NAME) if folder.is_dir() else download(model_id, **where)
        return cls(load_file(path, device, overrides or {}, kind=kind))

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        arguments = constructor_arguments(self.model)
        parameters = f"{sum(p.numel() for p in self.model.parameters()):,}"
        told = {"model": PUBLISHED_MODEL, "title": on_hub(arguments).title} | arguments
        return super().generate_model_card(*args, **told, arguments=arguments, parameters=parameters, **kwargs)


class HubAlpha(HubModel, paper_url=ON_HUB["CRATEAlpha"].paper, tags=["crate-alpha"]):
    """A CRATEAlpha likewise."""


BY_MEMBER: dict[str, type[HubModel]] = {"CRATE": HubModel, "CRATEAlpha": HubAlpha}


def as_on_hub(model: CRATE) -> HubModel:
    """`model` as its member of the family is on the Hub; raises ValueError where it was changed after it was built."""
    return BY_MEMBER[constructor_arguments(model).get("model", PUBLISHED_MODEL)](model)


def download(name: str, **where) -> Path:
    """The file of the model called `name`, ORGANISATION/NAME, or the index of the files it is split into, brought here from the
    Hub or its cache with its config.json.

    Args:
        where: `revision`, `cache_dir`, `force_download`, `local_files_only`, `token` of `huggingface_hub.hf_hub_download`.

    Raises:
        CheckpointError: there is no such file here, and none on the Hub, or the Hub cannot be reached.
    """
    try:
        try:
            path = Path(hf_hub_download(name, MODEL_NAME, **where))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the Hub was not asked, or did not answer: it is not asked again
                where |= {"local_files_only": True}
            path = _download_shards(name, error, **where)
        with suppress(EntryNotFoundError):  # there need be none
            hf_hub_download(name, CONFIG_NAME, **where)
        return path
    except Exception as error:
        raise _unavailable(name, error) from error


def _download_shards(name: str, otherwise: Exception, **where) -> Path:
    """The index of the model's files, brought here with them; raises `otherwise` where there is no index."""
    try:
        index = Path(hf_hub_download(name, INDEX_NAME, **where))
    except EntryNotFoundError:
        raise otherwise from None
    for shard in shards_of(index):
        hf_hub_download(name, shard, **where)
    return index


def _unavailable(name: str, error: Exception) -> CheckpointError:
    """The Hub's many errors, of the network, of the Hub, of the name, as one."""
    return CheckpointError(f"{name}: no such file or directory, and no model of the Hub that can be had ({first_line(error)})")

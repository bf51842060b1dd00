"""CRATE for Hugging Face transformers: importing this module makes its Auto classes and pipelines know the family.

`AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and `AutoImageProcessor` then read every folder and every model of
the Hub that `CRATE.save_pretrained` or their own `save_pretrained` wrote: both write the same.

Raises, when it is imported:
    MissingPackageError: transformers, or what it needs for images, is not installed.
"""

from __future__ import annotations

from ..optional import require

require("transformers", "huggingface_hub", "safetensors", "numpy", "PIL")

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification  # noqa: E402

from .configuration import CrateAlphaConfig, CrateConfig  # noqa: E402
from .images import CrateImageProcessor  # noqa: E402
from .models import (  # noqa: E402
    CrateAlphaForImageClassification,
    CrateAlphaModel,
    CrateForImageClassification,
    CrateModel,
    CratePreTrainedModel,
)

__all__ = [
    "CrateAlphaConfig",
    "CrateAlphaForImageClassification",
    "CrateAlphaModel",
    "CrateConfig",
    "CrateForImageClassification",
    "CrateImageProcessor",
    "CrateModel",
    "CratePreTrainedModel",
]

# One class under both names: what transformers asks for where torchvision is installed, and where it is not.
_PROCESSORS: dict[str, type] = {"pil": CrateImageProcessor, "torchvision": CrateImageProcessor}
for _config, _model, _classifier in (
    (CrateConfig, CrateModel, CrateForImageClassification),
    (CrateAlphaConfig, CrateAlphaModel, CrateAlphaForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
    AutoImageProcessor.register(_config, image_processor_classes=_PROCESSORS, exist_ok=True)

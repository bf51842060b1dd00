"""CRATE for Hugging Face transformers: importing this module makes its Auto classes and pipelines know "crate".

`AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and `AutoImageProcessor` then read every folder and every model of
the Hub that `CRATE.save_pretrained` or their own `save_pretrained` wrote: both write the same.

Raises, when it is imported:
    MissingPackageError: transformers, or what it needs for images, is not installed.
"""

from __future__ import annotations

from ..optional import require

require("transformers", "huggingface_hub", "safetensors", "numpy", "PIL")

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification  # noqa: E402

from ..checkpoint.hub_config import MODEL_TYPE  # noqa: E402
from .configuration import CrateConfig  # noqa: E402
from .images import CrateImageProcessor  # noqa: E402
from .models import CrateForImageClassification, CrateModel, CratePreTrainedModel  # noqa: E402

__all__ = ["CrateConfig", "CrateForImageClassification", "CrateImageProcessor", "CrateModel", "CratePreTrainedModel"]

AutoConfig.register(MODEL_TYPE, CrateConfig, exist_ok=True)
AutoModel.register(CrateConfig, CrateModel, exist_ok=True)
AutoModelForImageClassification.register(CrateConfig, CrateForImageClassification, exist_ok=True)
# One class under both names: what transformers asks for where torchvision is installed, and where it is not.
_PROCESSORS: dict[str, type] = {"pil": CrateImageProcessor, "torchvision": CrateImageProcessor}
AutoImageProcessor.register(CrateConfig, image_processor_classes=_PROCESSORS, exist_ok=True)

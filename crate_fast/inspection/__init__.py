"""What a CRATE does inside: rates and sparsity layer by layer, attention maps, projections in colour."""

from ..errors import InspectionError
from .components import foreground_masks, principal_colours, principal_components
from .maps import attention_maps, attention_row, keep_mass, patch_projections
from .rates import Measures, coding_rate, measure_layers, subspace_rate
from .views import LayerView, layer_views

__all__ = [
    "InspectionError",
    "LayerView",
    "Measures",
    "attention_maps",
    "attention_row",
    "coding_rate",
    "foreground_masks",
    "keep_mass",
    "layer_views",
    "measure_layers",
    "patch_projections",
    "principal_colours",
    "principal_components",
    "subspace_rate",
]

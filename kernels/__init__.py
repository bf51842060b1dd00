"""Triton kernels of CRATE with their autograd functions. Depends on torch, triton, `crate_fast.operators` and `.cache` alone.

They are `crate_fast.kernels`, and empty under the name `kernels`: that is another project's, for which transformers looks. In a
checkout it finds this folder, and the operators, registered again under their names, would be gone for whoever has them.
"""

if __name__ != "kernels":
    from .decoder import (
        DecoderSettings,
        DecoderState,
        DecoderWeights,
        PreparedDecoder,
        enter_decoder,
        fused_decoder_layer,
        leave_decoder,
        prepare_decoder,
    )
    from .ista import ISTA
    from .layer import LayerSettings, LayerWeights, PreparedWeights, fused_layer, prepare_layers, stack_weights
    from .mssa import MSSA
    from .odl import ODL
    from .runtime import INTERPRETED
    from .stack import StackState, enter_stack, leave_stack

__all__ = [
    "INTERPRETED",
    "ISTA",
    "MSSA",
    "ODL",
    "DecoderSettings",
    "DecoderState",
    "DecoderWeights",
    "LayerSettings",
    "LayerWeights",
    "PreparedDecoder",
    "PreparedWeights",
    "StackState",
    "enter_decoder",
    "enter_stack",
    "fused_decoder_layer",
    "fused_layer",
    "leave_decoder",
    "leave_stack",
    "prepare_decoder",
    "prepare_layers",
    "stack_weights",
]

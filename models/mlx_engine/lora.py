"""Adapters of a model's matrices, as `models.lora` defines them, as functions of arrays.

R rank, O out, I in of a matrix.
"""

import mlx.core as mx

from models.lora import LORA_A, LORA_B
from models.mlx_engine.model import Parameters
from models.tuning import LoraConfig


def effective(lora: LoraConfig, base: Parameters, adapters: Parameters) -> Parameters:
    """W + s·B·A for each of the base matrices."""
    return {
        name: mx.addmm(w_OI, adapters[LORA_B + name], adapters[LORA_A + name], alpha=lora.scale)
        for name, w_OI in base.items()
    }


def adapter_gradients(lora: LoraConfig, adapters: Parameters, gradients: Parameters) -> Parameters:
    """The adapters' gradients, which follow from those of W + s·B·A."""
    found: Parameters = {}
    for name, dw_OI in gradients.items():
        a_RI, b_OR = adapters[LORA_A + name], adapters[LORA_B + name]
        found[LORA_A + name] = lora.scale * (b_OR.T @ dw_OI)
        found[LORA_B + name] = lora.scale * (dw_OI @ a_RI.T)
    return found

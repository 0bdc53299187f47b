"""How much arithmetic training is, and how much of it a device can do.

Conventions: a multiply-add is two FLOPs. A matrix of (out, in) costs 2·out·in per token forward and twice that
backward; of a mixture only the chosen experts count. Attention costs 4·T·query_size per layer and token forward over
T positions, of which causality leaves half. Embedding look-ups, norms and activations are not counted; the head is,
tied or not. In training, the whole is three times the forward pass, and one more for the reference of preference
tuning: recomputation does not count. Training adapters is as much: their gradients are made of their matrices'.
"""

from models.config import ModelConfig

# Dense bf16 tensor-core peaks (fp16 for the T4, which has no bf16) of NVIDIA's data sheets, those of the SXM boards
# where there are several; NVIDIA quotes most with sparsity, which doubles them: "H100 Tensor Core GPU", "H200 Tensor
# Core GPU", "A100 Tensor Core GPU", "L4 Tensor Core GPU", "T4", and for the 4090 the Ada architecture white paper
# (with fp32 accumulation). The longer names come first: "H100 PCIe" is no "H100".
_PEAKS = (
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("T4", 65e12),
    ("RTX 4090", 165.2e12),
)


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of the forward pass for one token of a row of `sequence_length` tokens, on average over the row."""
    attention = 4 * sequence_length / 2 * model.query_size * model.num_hidden_layers
    return 2.0 * matmul_parameters(model) + attention


def training_flops_per_token(model: ModelConfig, sequence_length: int, *, reference: bool = False) -> float:
    """FLOPs of forward and backward pass: 6 per active parameter, and 12·T/2·query_size per layer for attention; a
    third more with a `reference` that reads the same."""
    return (4 if reference else 3) * forward_flops_per_token(model, sequence_length)


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters of the matrices that one token goes through."""
    width, inner = model.hidden_size, model.intermediate_size
    attention = width * (2 * model.query_size + 2 * model.key_value_size)
    if model.mlp == "mixture":
        experts, chosen = model.num_local_experts or 0, model.num_experts_per_tok or 0
        mlp = experts * width + chosen * 3 * width * inner
    else:
        mlp = (2 if model.mlp == "dense" else 3) * width * inner
    return model.num_hidden_layers * (attention + mlp) + model.vocab_size * width


def peak_flops_per_second(device: str) -> float | None:
    """Dense bf16 peak of a device, or of several as in `2 × cuda: NVIDIA H200`, by the name that
    `TrainingEngine.device` gives; None where it is not known."""
    words = device.replace("-", " ").split()
    count = int(words[0]) if words[1:2] == ["×"] else 1
    for name, peak in _PEAKS:
        if all(word in words for word in name.split()):
            return count * peak
    return None

"""A tokenizer, a model of some hundred parameters, and training of a second, for tests of training stages."""

from typing import Any

TOKENIZER: dict[str, Any] = {"vocabulary": {"kind": "characters", "characters": "0123456789+-*/="}}
MODEL: dict[str, Any] = {
    "architecture": "gpt2",
    "vocab_size": 18,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 16,
}


def pretraining(*portions: dict[str, Any], **training: Any) -> dict[str, Any]:
    """The config of a `pretrain` stage, with portions for its tokens and with changes to its training."""
    run: dict[str, Any] = {
        "steps": 8,
        "batch_size": 4,
        "sequence_length": 15,
        "optimizer": {"learning_rate": 0.01},
        **training,
    }
    return {"model": MODEL, "training": run, "blend": list(portions)}

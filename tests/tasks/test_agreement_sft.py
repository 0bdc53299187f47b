"""The same tuning on each engine: the same losses on conversations that it was not given."""

from pathlib import Path

import numpy as np
import pytest

from models.engine import EngineName
from tests.models.agreement import HERE, by_engine, pairs_of, several_engines, tell
from tests.tasks.conftest import RunStage
from tests.tasks.conversations import TOKENIZER, VOCABULARY, model, training, write_tokens

pytestmark = [pytest.mark.agreement, several_engines]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_tuned_models_lose_alike_on_all_engines(run_stage: RunStage, tmp_path: Path, architecture: str) -> None:
    tokenizer, _ = run_stage("tokenizer", TOKENIZER)
    plain, chatml = (write_tokens(tmp_path / name, tokenizer, name) for name in ("plain", "chatml"))
    config = {"model": model(architecture), "training": training(steps=10, packing="stream")}
    base, _ = run_stage("pretrain", config, tokens=plain)
    run = training(
        steps=40,
        optimizer={"learning_rate": 0.005},
        schedule={"warmup_steps": 5, "floor": 0.1},
        validation={"every": 5},
    )

    def tuned(engine: EngineName) -> list[float]:
        keys = {"engine": engine, "training": run, "vocab_size": VOCABULARY + 2}
        return [one["loss"] for one in run_stage("sft", keys, model=base, tokens=chatml)[1]["validation"]]

    losses = by_engine(tuned)
    for names, one, other in pairs_of(losses):
        assert len(one) == len(other) == 9
        found = float(np.abs(np.array(one) - np.array(other)).max())
        tell(architecture, names, found)
        assert found <= 1e-3, names
    first, *_, last = losses[HERE[0]]
    assert last < 0.7 * first

"""The same model scored on each engine: the same perplexity, document by document, and the same answers."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.engine import EngineName
from tests.models.agreement import HERE, by_engine, pairs_of, several_engines, tell
from tests.tasks.conftest import RunStage
from tests.tasks.test_publish import ARCHITECTURES, model_folder

pytestmark = [pytest.mark.agreement, several_engines]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral"])
def test_scores_agree(run_stage: RunStage, tmp_path: Path, architecture: str) -> None:
    model, _ = model_folder(tmp_path / "model", {**ARCHITECTURES[architecture], "max_position_embeddings": 32})
    source = {"kind": "arithmetic", "train": 1, "validation": 1, "test": 60, "operands": 3, "maximum": 99_999}
    documents, _ = run_stage("documents", {"source": source})

    def losses(engine: EngineName) -> list[float]:
        keys = {"engine": engine, "window": 12, "stride": 5, "batch_size": 7}
        folder, measured = run_stage("perplexity", keys, model=model, documents=documents)
        rows = pq.read_table(folder / "samples.parquet")
        return [measured["loss"], *rows["loss"].to_pylist()]

    def answers(engine: EngineName) -> list[str]:
        keys = {"engine": engine, "max_new_tokens": 3}
        folder, _ = run_stage("evaluate", keys, model=model, documents=documents)
        answers: list[str] = pq.read_table(folder / "samples.parquet")["prediction"].to_pylist()
        return answers

    for names, one, other in pairs_of(by_engine(losses)):
        difference = float(np.abs(np.array(one) - np.array(other)).max())
        tell(architecture, names, difference)
        assert difference <= 1e-4, names
    said = by_engine(answers)
    assert all(found == said[HERE[0]] for found in said.values())
    assert len(set(said[HERE[0]])) > 5

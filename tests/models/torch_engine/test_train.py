import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import weights
from models.engine import training_engine
from models.optimizer import OptimizerConfig
from tests.models.tiny import COMPOSITIONS, batch, cut, pieces, tiny

torch = pytest.importorskip("torch")

from models.torch_engine import inference_engine  # noqa: E402  # only where torch is
from models.torch_engine.model import Transformer  # noqa: E402

MUON = OptimizerConfig(name="muon", learning_rate=0.01)
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_the_module_has_the_parameters_of_the_contract(name: str) -> None:
    config = tiny(name)
    found = {name: tuple(parameter.shape) for name, parameter in Transformer(config, torch.float32).named_parameters()}
    assert found == {parameter.name: parameter.shape for parameter in weights.parameters(config)}


def test_dropout_leaves_the_random_numbers_of_others_alone() -> None:
    engine = training_engine("torch", tiny("gpt2", dropout=0.5), MUON, "float32")
    engine.restore("weights", pieces(dict(weights.initial_weights(tiny("gpt2"), 0))))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    engine.step([batch()], 1.0, 0)
    assert (torch.get_rng_state() == before).all()


def test_an_inference_engine_keeps_no_gradients_and_refuses_other_weights() -> None:
    config = tiny("llama")
    arrays = pieces(dict(weights.initial_weights(config, 0)))
    engine = inference_engine(config, "bfloat16", arrays)
    assert engine.logits(batch().tokens_BT).dtype == np.float32
    with pytest.raises(ValueError, match="is missing"):
        inference_engine(tiny("llama", num_hidden_layers=3), "float32", arrays)


_SECOND_HALF = """
import sys
from models import weights
from models.engine import training_engine
from models.optimizer import OptimizerConfig
from tests.models.tiny import batch, cut, pieces, tiny
folder = sys.argv[1]
config = tiny("mixtral", dropout=0.2)
engine = training_engine("torch", config, OptimizerConfig(name="muon", learning_rate=0.01), "bfloat16")
for state in ("weights", "optimizer"):
    engine.restore(state, pieces(weights.read_arrays(f"{folder}/{state}.safetensors")))
for step in range(2, 4):
    engine.step(cut(batch(seed=step), 2), 1.0, step)
from pathlib import Path
found = weights.assemble(engine.export("weights"), weights.canonical_shapes(config))
weights.write_arrays(Path(folder) / "end.safetensors", found)
"""


def test_another_process_goes_on_bitwise(tmp_path: Path) -> None:
    config = tiny("mixtral", dropout=0.2)
    shapes = weights.canonical_shapes(config)
    engine = training_engine("torch", config, MUON, "bfloat16")
    engine.restore("weights", pieces(dict(weights.initial_weights(config, 0))))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(4):
            if step == 2:
                for state in ("weights", "optimizer"):
                    arrays = weights.assemble(engine.export(state), shapes)
                    weights.write_arrays(tmp_path / f"{state}.safetensors", arrays)
            engine.step(cut(batch(seed=step), 2), 1.0, step)
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, "-c", _SECOND_HALF, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)}, check=True)
    weights.write_arrays(tmp_path / "straight.safetensors", weights.assemble(engine.export("weights"), shapes))
    assert (tmp_path / "straight.safetensors").read_bytes() == (tmp_path / "end.safetensors").read_bytes()

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import weights
from models.engine import training_engine
from models.optimizer import OptimizerConfig
from tests.models.tiny import COMPOSITIONS, batch, pieces, tiny

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


_STEPS = """
import sys
from pathlib import Path
from models import weights
from models.engine import training_engine
from models.optimizer import OptimizerConfig
from tests.models.tiny import batch, cut, pieces, tiny
folder, start = Path(sys.argv[1]), int(sys.argv[2])
config = tiny("mixtral", dropout=0.2)
shapes = weights.canonical_shapes(config)
engine = training_engine("torch", config, OptimizerConfig(name="muon", learning_rate=0.01), "bfloat16")
engine.restore("weights", pieces(dict(weights.initial_weights(config, 0))))
for step in range(start, 4):
    for state in ("weights", "optimizer"):
        file = folder / f"{state}-{step}.safetensors"
        if step == start > 0:
            engine.restore(state, pieces(weights.read_arrays(file)))
        else:
            weights.write_arrays(file, weights.assemble(engine.export(state), shapes))
    engine.step(cut(batch(seed=step), 2), 1.0, step)
weights.write_arrays(folder / f"from-{start}.safetensors", weights.assemble(engine.export("weights"), shapes))
"""


def test_another_process_goes_on_bitwise(tmp_path: Path) -> None:
    # Both are processes without MLX, whose BLAS a PyTorch that is imported later would take for its own.
    for start in (0, 2):
        command = [sys.executable, "-c", _STEPS, str(tmp_path), str(start)]
        subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)}, check=True)
    straight, second = (tmp_path / f"from-{start}.safetensors" for start in (0, 2))
    assert straight.read_bytes() == second.read_bytes()
    assert straight.read_bytes() != (tmp_path / "weights-2.safetensors").read_bytes()

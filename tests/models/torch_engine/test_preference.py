"""Preference tuning against PyTorch's own gradients of the formula, dropout and threads included."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import weights
from models.config import ModelConfig
from models.engine import Batch
from models.torch_engine import head
from models.torch_engine.packing import packed
from models.torch_engine.train import TorchTraining
from tests.models.preferring import BETA, gradients, pairs, preferring
from tests.models.test_engines import assert_same
from tests.models.tiny import Arrays, tiny


def trainer(config: ModelConfig) -> TorchTraining:
    engine = preferring("torch", config)
    assert isinstance(engine, TorchTraining)
    return engine


def by_formula(engine: TorchTraining, rows: Batch, key: int) -> tuple[float, Arrays]:
    """The loss and its gradients, all logits at once and nothing taken apart."""
    config, model = engine._config, engine._model
    assert engine._reference is not None
    own = packed(rows, config.vocab_size, config.max_position_embeddings, torch.device("cpu"))
    of_row = torch.from_numpy(np.flatnonzero(rows.loss_mask_BT) // rows.loss_mask_BT.shape[1])

    def log_probabilities(logits_MV: torch.Tensor) -> torch.Tensor:
        logs_M = F.log_softmax(logits_MV, -1).gather(1, own.targets_M[:, None])[:, 0]
        return torch.stack([logs_M[of_row == row].sum() for row in range(len(rows.tokens_BT))])

    with torch.no_grad():
        reference_B = log_probabilities(engine._reference._parallel.model(own.rows))
    model.train()
    model.zero_grad()
    with engine._dropout(key, 0):
        policy_B = log_probabilities(model(own.rows))
    ratios_P2 = (policy_B - reference_B).view(-1, 2)
    loss = -F.logsigmoid(BETA * (ratios_P2[:, 0] - ratios_P2[:, 1])).mean()
    torch.autograd.backward(loss)
    parameters = dict(model.named_parameters())
    found = []
    for parameter in weights.parameters(config):
        gradient = parameters[parameter.name].grad
        assert gradient is not None
        found += list(weights.to_canonical(parameter, gradient.numpy().copy()))
    return loss.item(), weights.gather(found, weights.canonical_shapes(config))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "custom"])
def test_gradients_are_those_of_the_formula(name: str, dropout: float) -> None:
    engine = trainer(tiny(name, dropout=dropout))
    # Threads would take the rows apart.
    engine._lanes = None
    loss, expected = by_formula(engine, pairs(4), 5)
    assert_same(gradients(engine, [pairs(4)], 5), expected, atol=1e-6)
    assert float(engine.step([pairs(4)], 1.0, 5).loss) == pytest.approx(loss, rel=1e-5)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_keep_pairs_together(count: int) -> None:
    several, one = trainer(tiny("gpt2")), trainer(tiny("gpt2"))
    assert several._lanes is not None
    one._lanes = None
    assert_same(gradients(several, [pairs(count)]), gradients(one, [pairs(count)]), atol=1e-6)
    results = [engine.step([pairs(count)], 1.0, 0) for engine in (several, one)]
    assert results[0].figures.tolist() == pytest.approx(results[1].figures.tolist(), abs=1e-5)


@pytest.mark.parametrize("part", [1, 5, 256])
def test_targets_weigh_as_much_as_they_are_told(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._LOGITS, "cpu", 1)
    monkeypatch.setitem(head._POSITIONS, "cpu", part)
    torch.manual_seed(0)
    x, weight = torch.randn(23, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets, weights_M = torch.randint(0, 11, (23,)), torch.randn(23)
    whole = 0.3 * (F.cross_entropy(x @ weight.T, targets, reduction="none") * weights_M).sum()
    loss = head.summed_loss(x, weight, targets, 0.3, weights_M)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(whole, (x, weight)))
    with torch.no_grad():
        torch.testing.assert_close(head.summed_loss(x, weight, targets, 0.3, weights_M), whole)

import numpy as np
import pytest

from models.optimizer import OptimizerConfig
from tests.models.reference import orthogonalised as reference

torch = pytest.importorskip("torch")

from models.torch_engine.optimizer import Optimizer, orthogonalised  # noqa: E402  # only where torch is


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (4, 12, 5)])
def test_newton_schulz_is_that_of_the_definition(shape: tuple[int, ...]) -> None:
    updates = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = orthogonalised(torch.from_numpy(updates), 5, torch.float32)
    for matrix, expected in zip(found.numpy(), updates, strict=True):
        np.testing.assert_allclose(matrix, reference(expected.astype(np.float64), 5), atol=1e-5)
    # Five steps bring all but the smallest singular values near 1.
    values = np.linalg.svd(found.numpy(), compute_uv=False)
    assert values[:, :-1].min() > 0.3
    assert values.max() < 1.3


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalised(torch.zeros(1, 4, 6), 5, torch.float32).any()


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 40)])
def test_muon_in_bf16_is_that_of_pytorch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    name = "layers.0.mlp.up_proj.weight"
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    config = OptimizerConfig(
        name="muon", learning_rate=0.1, muon_learning_rate=0.1, newton_schulz_dtype="bfloat16", clip=None
    )
    # AdamW always has the embeddings.
    embedding = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer(config, {"embed_tokens.weight": embedding, name: ours})
    muon = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95)
    for _ in range(4):
        gradient = torch.randn(shape)
        embedding.grad, ours.grad, theirs.grad = torch.zeros(2, 2), gradient.clone(), gradient.clone()
        optimizer.step(1.0, torch.tensor(1.0))
        muon.step()
    moved = float((theirs - 1).detach().abs().mean())
    assert float((ours - theirs).detach().abs().mean()) < 0.01 * moved
    torch.testing.assert_close(optimizer.moments["momentum_buffer"][name], muon.state[theirs]["momentum_buffer"])


def test_adamw_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    matrix, vector = torch.randn(5, 7), torch.randn(7)
    ours = {
        "embed_tokens.weight": torch.nn.Parameter(matrix.clone()),
        "norm.weight": torch.nn.Parameter(vector.clone()),
    }
    theirs = [torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(vector.clone())]
    optimizer = Optimizer(OptimizerConfig(learning_rate=0.01, clip=None), ours)
    adamw = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(4):
        for one, other in zip(ours.values(), theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        norm, skipped = optimizer.step(1.0, torch.tensor(0.5))
        adamw.step()
        assert not skipped
        assert optimizer.updates == step + 1
        assert float(norm) == pytest.approx(float(torch.cat([p.grad.flatten() for p in theirs]).norm()), rel=1e-5)
    for one, other in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_loss_that_is_not_finite_is_enough_to_skip() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer(OptimizerConfig(learning_rate=0.1), {"embed_tokens.weight": weight})
    weight.grad = torch.ones(2, 2)
    _, skipped = optimizer.step(1.0, torch.tensor(float("nan")))
    assert float(skipped) == 1
    assert optimizer.updates == 0
    assert (weight == 1).all()


@pytest.mark.parametrize("updates", [0, 7])
def test_adamw_by_plain_operations_is_the_fused_one(updates: int) -> None:
    """Which stands in for it on Apple's GPU."""
    torch.manual_seed(0)
    start = {"embed_tokens.weight": torch.randn(5, 7), "norm.weight": torch.randn(7)}
    both = []
    for fused in (True, False):
        parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
        optimizer = Optimizer(OptimizerConfig(learning_rate=0.01, clip=0.5), parameters)
        for part in optimizer.adamw:
            part.fused = fused
        optimizer.updates = updates
        both.append((parameters, optimizer))
    for step in range(6):
        gradients = {name: torch.randn_like(tensor) for name, tensor in start.items()}
        if step in (0, 3):
            gradients["norm.weight"][2] = torch.nan
        for parameters, optimizer in both:
            for name, parameter in parameters.items():
                parameter.grad = gradients[name].clone()
            _, skipped = optimizer.step(0.7, torch.tensor(1.0))
            assert bool(skipped) == (step in (0, 3))
        (ones, one), (others, other) = both
        assert one.updates == other.updates
        for name, parameter in ones.items():
            torch.testing.assert_close(others[name], parameter, rtol=1e-5, atol=1e-7)
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(other.moments[moment][name], one.moments[moment][name])

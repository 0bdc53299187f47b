"""What is dropped in rows that several processes divide is what one process drops, wherever the engine draws."""

import numpy as np
import pytest

from models import weights
from models.engine import Batch
from tests.models.tiny import VOCABULARY, batch, pieces, tiny

torch = pytest.importorskip("torch")

from models.torch_engine.device import seeded  # noqa: E402  # only where torch is
from models.torch_engine.dropout import Share, dropped  # noqa: E402
from models.torch_engine.model import Transformer  # noqa: E402
from models.torch_engine.packing import Own, packed  # noqa: E402
from models.torch_engine.train import load_weights  # noqa: E402
from models.torch_engine.world import World  # noqa: E402

CPU = torch.device("cpu")


def documents(rows: int, length: int) -> Batch:
    """Rows of documents of very different lengths, of which some count nothing."""
    random = np.random.default_rng(5)
    whole = batch(rows=rows, length=length, padded=False)
    documents_BT = (random.random((rows, length)) < 0.08).cumsum(1).astype(np.int32)
    return Batch(whole.tokens_BT, whole.targets_BT, random.random((rows, length)) < 0.5, documents_BT)


BATCHES = {
    "padded": batch(rows=7),
    "every position counts": batch(rows=4, length=9, padded=False),
    "in blocks": batch(rows=3, length=140),
    "documents": documents(5, 150),
    "too few rows": batch(rows=2),
}


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
@pytest.mark.parametrize("rows", list(BATCHES))
@pytest.mark.parametrize("processes", [2, 3])
def test_masks_are_those_of_one_process(kind: str, rows: str, processes: int) -> None:
    config = tiny(kind, dropout=0.4, max_position_embeddings=160)
    model = Transformer(config, torch.float32).train()
    load_weights(model, pieces(dict(weights.initial_weights(config, 0))))
    whole, read = BATCHES[rows], 0
    with torch.no_grad(), seeded((3, 0), CPU):
        expected_MD = model.read(packed(whole, VOCABULARY, 160, CPU).rows)
    for process in range(processes):
        own = Own(World(process, processes, 1, None).own(len(whole.tokens_BT)), process, processes)
        part = packed(whole, VOCABULARY, 160, CPU, own)
        share = part.rows.share_N if part.rows.read_M is None else part.rows.share_M
        assert share is not None
        with torch.no_grad(), seeded((3, 0), CPU):
            found_MD = model.read(part.rows)
        torch.testing.assert_close(found_MD, expected_MD[share.own_P], atol=2e-5, rtol=0)
        read += len(found_MD)
    assert read == len(expected_MD)


def test_a_share_is_of_the_mask_of_all() -> None:
    x, own = torch.randn(6, 50), torch.tensor([1, 4])
    with seeded((1,), CPU):
        expected = dropped(x, 0.5, None)
    with seeded((1,), CPU):
        found = dropped(x[own], 0.5, Share(6, own, 0, 2))
    torch.testing.assert_close(found, expected[own], atol=0, rtol=0)
    assert 0 < int((found == 0).sum()) < found.numel()

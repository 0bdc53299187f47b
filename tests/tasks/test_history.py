"""The history of a model, as a file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from tasks.history import HISTORY, Grown, Loss, Trained, read_history, trained_flops, trained_tokens, write_history

_LOSSES = st.builds(Loss, step=st.integers(0, 1 << 40), loss=st.floats(allow_nan=False))
_TRAINED = st.builds(
    Trained,
    parameters=st.integers(1, 1 << 40),
    steps=st.integers(0, 1 << 40),
    tokens=st.integers(0, 1 << 60),
    flops=st.floats(0, 1e30),
    fresh_optimizer=st.booleans(),
    measured_on=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    validation=st.lists(_LOSSES, max_size=5).map(tuple),
)
_GROWN = st.builds(
    Grown,
    operator=st.text(),
    parameters_before=st.integers(1, 1 << 40),
    parameters=st.integers(1, 1 << 40),
    optimizer_state=st.none() | st.sampled_from(["copy", "reset"]),
)


@given(history=st.lists(_TRAINED | _GROWN, max_size=5).map(tuple))
def test_a_history_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, history: tuple[Trained, ...]
) -> None:
    folder = tmp_path_factory.mktemp("model")
    write_history(folder, history)
    assert read_history(folder) == history


def test_totals_count_training_alone() -> None:
    trained = Trained(parameters=8, steps=2, tokens=100, flops=1e3, measured_on=None, validation=())
    history = (trained, Grown(operator="stack", parameters_before=8, parameters=16), trained)
    assert trained_tokens(history) == 200
    assert trained_flops(history) == 2e3


def test_a_loss_without_end_is_kept(tmp_path: Path) -> None:
    validation = (Loss(step=0, loss=float("inf")),)
    trained = Trained(parameters=8, steps=2, tokens=100, flops=1e3, measured_on="a", validation=validation)
    write_history(tmp_path, (trained,))
    assert read_history(tmp_path) == (trained,)


@pytest.mark.parametrize("content", [None, b"", b"{}", b'[{"kind": "stolen"}]', b'[{"kind": "trained"}]'])
def test_what_is_no_history_is_refused_in_a_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / HISTORY).write_bytes(content)
    with pytest.raises(UserError, match=r"is no history of a model .*; make the model again") as refused:
        read_history(tmp_path)
    assert "\n" not in str(refused.value)

"""Token shards: what is written is read, and what is damaged is refused or read within its bounds."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from models.training.batches import Packing
from models.training.shards import check_document_ends, open_shard, write_shard
from tests.models.training.folders import batches, folder_source, shards


@pytest.mark.parametrize(
    ("tokens", "ends", "mask", "message"),
    [
        (np.zeros(3, np.int64), [3], None, "uint16 or uint32"),
        (np.zeros(3, np.uint16), [2, 1, 3], None, "do not rise"),
        (np.zeros(3, np.uint16), [2], None, "do not end"),
        (np.zeros(3, np.uint16), [3], [1], "loss_mask has the shape"),
    ],
)
def test_a_wrong_shard_is_not_written(
    tmp_path: Path, tokens: np.ndarray, ends: list[int], mask: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.safetensors", tokens, ends, mask)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), packing=st.sampled_from(["stream", "documents"]), masking=st.booleans())
def test_a_damaged_shard_is_refused_or_read_within_its_bounds(
    data: st.DataObject, packing: Packing, masking: bool
) -> None:
    with shards(30, masked=True) as folder:
        source = folder_source(folder)
        path = folder / source.shards[0].name
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["cut", "longer", "flip"]))
        if kind == "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        elif kind == "longer":
            content += b"x"
        else:
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            batch = batches(source, packing=packing, document_masking=masking).rows(0, 20)
        except UserError as error:
            assert str(path) in str(error) or "holds the token" in str(error)  # noqa: PT017  # either is right
        else:
            assert kind == "flip"
            assert len(batch.tokens_BT) == 20
            assert open_shard(path).map().tokens_N.size == 30


def test_documents_have_to_end_where_the_tokens_do(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_shard(path, np.zeros(9, np.uint16), [2, 2, 9])
    shard = open_shard(path).map()
    check_document_ends(shard, path)
    for ends in ([2, 2, 8], [2, 1, 9], [2, 10, 9]):
        wrong = shard._replace(document_ends_D=np.array(ends, np.uint64))
        with pytest.raises(UserError, match="is no intact token shard"):
            check_document_ends(wrong, path)


def test_a_header_of_nonsense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for header in (b"[" * 100_000, b"[]", b'{"tokens":5}', b'{"tokens":{"dtype":"U16","shape":[-1]}}', b"\xff"):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(UserError, match="is no intact token shard"):
            open_shard(path)
    path.write_bytes((1 << 62).to_bytes(8, "little"))
    with pytest.raises(UserError, match="longer than the file"):
        open_shard(path)
    with pytest.raises(UserError, match="is no intact token shard"):
        open_shard(tmp_path / "missing.safetensors")

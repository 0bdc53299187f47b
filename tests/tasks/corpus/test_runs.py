from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus import runs as module
from tasks.corpus.runs import Runs

KEYS = st.sampled_from([0, 1, 2, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
PAIRS = st.lists(st.tuples(KEYS, st.integers(0, 9)), max_size=30)


def numbers(values: Sequence[int]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.array(values, np.uint64)


def check(runs: Runs, pairs: Sequence[tuple[int, int]], asked: Sequence[int]) -> None:
    query, values = runs.find(numbers(asked))
    found = sorted(zip(query.tolist(), values.tolist(), strict=True))
    assert found == sorted((place, value) for place, key in enumerate(asked) for own, value in pairs if own == key)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PAIRS, st.sampled_from(["", "save", "open"])), max_size=25), st.lists(KEYS, max_size=9))
def test_all_pairs_are_found_whatever_is_merged(
    steps: list[tuple[list[tuple[int, int]], str]], asked: list[int]
) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MEMORY_PAIRS", 40)
        patch.setattr(module, "_MERGE_PAIRS", 16)
        folder = Path(name)
        runs = Runs(folder, "pairs")
        pairs: list[tuple[int, int]] = []
        for added, then in steps:
            runs.add(numbers([key for key, _ in added]), numbers([value for _, value in added]))
            pairs += added
            if then:
                names = runs.save()
                for path in folder.iterdir():
                    if path.name not in names:
                        path.unlink()
            if then == "open":
                runs = Runs(folder, "pairs", names)
            check(runs, pairs, [*asked, *(key for key, _ in pairs[-5:]), *asked])


def test_files_stay_few_and_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEMORY_PAIRS", 1000)
    monkeypatch.setattr(module, "_MERGE_PAIRS", 700)
    runs, source, names = Runs(tmp_path, "pairs"), np.random.default_rng(0), []
    for _ in range(100):
        keys = source.integers(0, 2**64, 300, np.uint64)
        runs.add(keys, keys + np.uint64(1))
        names = runs.save()
        assert len(names) <= 3 * 5
    loaded = [np.load(tmp_path / name) for name in names]
    assert all((np.diff(keys.astype(object)) >= 0).all() for keys, _ in loaded)
    assert all((values == keys + np.uint64(1)).all() for keys, values in loaded)
    assert sum(keys.size for keys, _ in loaded) == 30_000


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "pairs")
    runs.add(numbers([3, 1]), numbers([4, 5]))
    (name,) = runs.save()
    content = (tmp_path / name).read_bytes()
    for damaged in (content[:-1], content[:20], b"", content.replace(b"'<u8'", b"'<f8'"), b"x" + content[1:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises((ValueError, EOFError)):
            Runs(tmp_path, "pairs", [name])
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError):
        Runs(tmp_path, "pairs", [name])

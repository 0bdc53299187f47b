import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.corpus import near as near_module
from tasks.corpus.duplicates import DuplicateIndex, DuplicatesConfig, Fingerprints, fingerprints
from tasks.corpus.minhash import NearConfig, Signatures, signatures
from tasks.corpus.splitting import text_hashes
from tasks.corpus.text import Texts
from tests.tasks.corpus.test_minhash import shingles

EXACT = DuplicatesConfig()
BOTH = DuplicatesConfig(near=NearConfig(ngram=2, permutations=32, threshold=0.6))
NEAR = DuplicatesConfig(exact=False, near=NearConfig(ngram=2, permutations=32, threshold=0.6))
NEITHER = DuplicatesConfig(exact=False)
CONFIGS = st.sampled_from([EXACT, BOTH, NEAR, NEITHER])

# Texts of which many are equal, and many nearly.
SIMILAR = st.lists(st.sampled_from("abcdefgh"), max_size=3).map(
    lambda ends: " ".join(["one two three four five", *ends])
)
DOCUMENTS = st.lists(st.tuples(SIMILAR | st.sampled_from(["", " ", "x"]), st.integers(0, 9).map(bool)), max_size=25)


def reference(documents: Sequence[tuple[str, bool]], config: DuplicatesConfig) -> list[str]:
    """What becomes of documents that are looked at one by one, each compared with all kept before it."""
    kept: list[str] = []
    fates = []
    for text, candidate in documents:
        if not candidate:
            fates.append("none")
        elif config.exact and text in kept:
            fates.append("exact")
        elif config.near is not None and any(_near(text, other, config.near) for other in kept):
            fates.append("near")
        else:
            fates.append("kept")
            kept.append(text)
    return fates


def _near(text: str, other: str, config: NearConfig) -> bool:
    found = signatures(Texts.of([text, other]), config)
    shares_a_band = bool((found.band_DB[0] == found.band_DB[1]).any())
    agreement = float((found.signature_DP[0] == found.signature_DP[1]).mean())
    return bool(found.has_words_D.all()) and shares_a_band and agreement >= config.threshold


def fates(index: DuplicateIndex, documents: Sequence[tuple[str, bool]], config: DuplicatesConfig) -> list[str]:
    texts = Texts.of([text for text, _ in documents])
    candidates_D = np.array([candidate for _, candidate in documents], np.bool_)
    novel = index.novel(fingerprints(texts, config), candidates_D)
    found = np.full(len(documents), "none", "U5")
    for name, chosen_D in (("kept", novel.kept_D), ("exact", novel.exact_D), ("near", novel.near_D)):
        assert (found[chosen_D] == "none").all()
        found[chosen_D] = name
    assert ((found == "none") == ~candidates_D).all()
    return found.tolist()


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, CONFIGS, st.lists(st.tuples(st.integers(0, 25), st.sampled_from(["", "commit", "open"])), max_size=4))
def test_documents_are_compared_with_those_kept_before(
    documents: list[tuple[str, bool]], config: DuplicatesConfig, cuts: list[tuple[int, str]]
) -> None:
    """Whatever the batches, and whatever is on disk."""
    with TemporaryDirectory() as name:
        index = DuplicateIndex(Path(name), config)
        found, begin = [], 0
        for end, then in [*sorted(cuts), (len(documents), "")]:
            found += fates(index, documents[begin:end], config)
            begin = max(begin, min(end, len(documents)))
            if then:
                index.commit(b"state")
            if then == "open":
                index.close()
                index = DuplicateIndex(Path(name), config)
        index.close()
    assert found == reference(documents, config)


def test_fingerprints_begin_with_the_hash_that_splits_go_by() -> None:
    texts = Texts(pa.table({"text": ["", "a", "é" * 5000, "a\x00"]}))
    prints = fingerprints(texts, EXACT)
    assert prints.near is None
    assert prints.digest_D2.shape == (4, 2)
    assert (prints.hash_D == text_hashes(texts.table)).all()
    assert fingerprints(Texts.of([]), BOTH).digest_D2.shape == (0, 2)


def test_what_was_not_committed_is_forgotten(tmp_path: Path) -> None:
    index = DuplicateIndex(tmp_path / "index", BOTH)
    assert index.state() is None
    first, second, third = ([(text, True)] for text in ("one two three", "quite another text", "and again something"))
    assert fates(index, first, BOTH) == ["kept"]
    index.commit(b"\x00\n1\xff")
    assert fates(index, second, BOTH) == ["kept"]
    index.close()
    index = DuplicateIndex(tmp_path / "index", BOTH)
    assert index.state() == b"\x00\n1\xff"
    assert fates(index, third, BOTH) == ["kept"]
    copies = [(text.upper(), True) for text, _ in (*first, *second, *third)]
    assert fates(index, [*copies, *second, *first, *second], BOTH) == ["near", "kept", "near", "near", "exact", "near"]
    index.commit(b"")
    assert index.state() == b""
    index.close()


def test_all_128_bits_and_the_very_threshold_count(tmp_path: Path) -> None:
    config = DuplicatesConfig(near=NearConfig(permutations=10, threshold=0.7))
    signature_DP = np.arange(10, dtype=np.uint16) + np.zeros((4, 1), np.uint16)
    signature_DP[1, :3] += 100
    signature_DP[2, :4] += 200
    band_DB = np.array([[1], [1], [1], [2]], np.uint64)
    digest_D2 = np.array([[7, 1], [7, 2], [7, 3], [7, 4]], np.uint64)
    prints = Fingerprints(digest_D2, Signatures(np.ones(4, np.bool_), signature_DP, band_DB))
    for name, cuts in (("whole", [0, 4]), ("one by one", [0, 1, 2, 3, 4])):
        index = DuplicateIndex(tmp_path / name, config)
        kept, near = [], []
        for begin, end in pairwise(cuts):
            candidates = np.zeros(4, np.bool_)
            candidates[begin:end] = True
            novel = index.novel(prints, candidates)
            kept += novel.kept_D[begin:end].tolist()
            near += novel.near_D[begin:end].tolist()
            assert not novel.exact_D.any()
        index.close()
        assert near == [False, True, False, False]
        assert kept == [True, False, True, True]


def test_an_index_of_other_duplicates_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    index = DuplicateIndex(tmp_path, BOTH)
    fates(index, [("one two three", True), ("and so on", True)], BOTH)
    index.commit(b"state")
    index.close()
    with pytest.raises(ValueError, match="other duplicates"):
        DuplicateIndex(tmp_path, EXACT)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises((ValueError, EOFError)):
            DuplicateIndex(tmp_path, BOTH)
        path.write_bytes(content)
    DuplicateIndex(tmp_path, BOTH).close()


def test_documents_that_share_surroundings_are_not_all_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A band leads to few documents, the same ones for all batches."""
    monkeypatch.setattr(near_module, "_BAND_DOCUMENTS", 3)
    frame = " ".join(f"frame{place}" for place in range(60))
    source = np.random.default_rng(0)
    documents = [(f"{frame} " + " ".join(map(str, source.integers(0, 1 << 40, 35))), True) for _ in range(60)]
    whole = DuplicateIndex(tmp_path / "whole", BOTH)
    expected = fates(whole, documents * 2, BOTH)
    parts = DuplicateIndex(tmp_path / "parts", BOTH)
    found = [fate for begin in range(0, 120, 7) for fate in fates(parts, (documents * 2)[begin : begin + 7], BOTH)]
    assert found == expected
    assert expected[60:] == ["exact" if fate == "kept" else fate for fate in expected[:60]]
    for index in (whole, parts):
        names = index._near.save() if index._near else []
        keys = np.concatenate([np.load(next(tmp_path.glob(f"*/{name}")))[0] for name in names])
        assert np.unique_counts(keys).counts.max() == 3
        index.close()


# A corpus with planted duplicates: recall and precision by the similarity of the pairs.


def zipf_documents(count: int, source: np.random.Generator) -> list[str]:
    """Documents of some hundred words whose frequencies are like those of a language."""
    vocabulary = [f"w{word:x}" for word in range(20_000)]
    return [
        " ".join(vocabulary[min(word, 20_000) - 1] for word in source.zipf(1.3, source.integers(150, 700)).tolist())
        for _ in range(count)
    ]


def real_documents(count: int) -> list[str]:
    hub = os.environ.get("CAIRN_HUB")
    if not hub:
        pytest.skip("CAIRN_HUB is not set: there are no real documents to plant duplicates among")
    path = Path(hub) / "local/openstax-textbooks/default/train-00000-of-00001.parquet"
    texts = [text for text in pq.read_table(path, columns=["text"])["text"].to_pylist() if len(text.split()) > 150]
    return [text[:4000] for text in dict.fromkeys(texts)][:count]


def changed(text: str, share: float, source: np.random.Generator) -> str:
    """A copy in which a share of the words are others."""
    words = text.split(" ")
    for place in source.choice(len(words), max(1, round(share * len(words))), replace=False).tolist():
        words[place] = f"v{source.integers(1 << 40):x}"
    return " ".join(words)


def similarities(texts: Sequence[str], originals: Iterable[int]) -> NDArray[np.float64]:
    """The Jaccard similarity of each text's shingles and its original's."""
    sets = [shingles(text, NearConfig().ngram) for text in texts]
    pairs = [(own, sets[original]) for own, original in zip(sets, originals, strict=True)]
    return np.array([len(own & other) / len(own | other) for own, other in pairs])


@pytest.mark.parametrize("kind", ["generated", "real"])
def test_planted_duplicates_are_found_and_others_kept(tmp_path: Path, kind: str) -> None:
    """Of copies with a similarity of 0.9 or more at least 99% are dropped, of those below 0.6 none.

    Between them the estimate decides: at least half of those above the threshold go, at most half of those below it.
    """
    source = np.random.default_rng(0)
    base = zipf_documents(500, source) if kind == "generated" else real_documents(500)
    texts, originals = list(base), list(range(len(base)))
    for share in (0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1):
        copied = source.choice(len(base), 200, replace=False).tolist()
        texts += [changed(base[original], share, source) for original in copied]
        originals += copied
    config = DuplicatesConfig(near=NearConfig())
    index = DuplicateIndex(tmp_path, config)
    found: list[str] = []
    for begin in range(0, len(texts), 97):
        found += fates(index, [(text, True) for text in texts[begin : begin + 97]], config)
        index.commit(b"")
    index.close()
    base_fates, near = found[: len(base)], np.array(found[len(base) :]) == "near"
    # Documents of a real corpus may be alike: copies of what was dropped have nothing to be near to but its own like.
    kept = np.array([base_fates[original] == "kept" for original in originals[len(base) :]])
    similarity = similarities(texts, originals)[len(base) :]
    assert base_fates.count("kept") > 0.97 * len(base)
    high, middle, low = similarity >= 0.9, (similarity >= 0.8) & (similarity < 0.9), similarity < 0.6
    below = (similarity >= 0.6) & (similarity < 0.8)
    assert min(mask.sum() for mask in (high, middle, below, low)) >= 100
    assert near[high & kept].mean() >= 0.99
    assert near[middle & kept].mean() >= 0.5
    assert near[below & kept].mean() <= 0.5
    assert not near[low & kept].any()


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from tasks.corpus.duplicates import DuplicateIndex, DuplicatesConfig, fingerprints
from tasks.corpus.minhash import NearConfig
from tasks.corpus.runs import Runs
from tasks.corpus import runs
from tasks.corpus.text import Texts
runs._MEMORY_PAIRS, runs._MERGE_PAIRS = 300, 100
config = DuplicatesConfig(near=NearConfig(permutations=16))
index = DuplicateIndex(Path(sys.argv[1]), config)
done = int(index.state() or 0)
while True:
    texts = Texts.of([f"text {number} " * 3 + f"{number * 7919} end" for number in range(done, done + 40)])
    novel = index.novel(fingerprints(texts, config), np.ones(40, bool))
    assert novel.kept_D.all(), (done, novel)
    done += 40
    if done % 120 == 0:
        index.commit(str(done).encode())
        print(done, flush=True)
"""


def test_after_kills_the_index_is_as_it_was_committed(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    config = DuplicatesConfig(near=NearConfig(permutations=16))
    before = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        told = int(process.stdout.readline())
        time.sleep(float(source.uniform(0, 0.3)))
        process.send_signal(signal.SIGKILL)
        told = max([told, *(int(line) for line in process.stdout.read().split("\n")[:-1] if line)])
        process.wait()
        process.stdout.close()
        index = DuplicateIndex(tmp_path, config)
        committed = int(index.state() or b"0")
        assert before < told <= committed <= told + 120
        texts = Texts.of([f"text {n} " * 3 + f"{n * 7919} end" for n in range(max(0, committed - 500), committed + 50)])
        novel = index.novel(fingerprints(texts, config), np.ones(len(texts), np.bool_))
        assert novel.exact_D[:-50].all()
        assert novel.kept_D[-50:].all()
        index.close()
        header = json.loads((tmp_path / "index").read_bytes().partition(b"\n")[0])
        assert {path.name for path in tmp_path.glob("*.npy")} >= {*header["exact"], *header["near"]}
        before = committed

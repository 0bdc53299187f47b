from pathlib import Path

import pytest

from common.errors import UserError
from tasks.harness.data import check_unchanged, data_sets, identities, offline_first


def write_rows(folder: Path, rows: int = 3) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "default").mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": [f"row {number}" for number in range(rows)]})
    pq.write_table(table, folder / "default" / "test-00000-of-00001.parquet")


def test_what_a_definition_names() -> None:
    assert data_sets({"dataset_path": "allenai/ai2_arc"}) == ["allenai/ai2_arc"]
    assert data_sets({"dataset_path": "json", "dataset_kwargs": {"data_files": "x.json"}}) == []
    assert data_sets({"custom_dataset": "utils.load"}) == []


def test_a_local_copy_is_read_and_told_by_its_digest(empty_hub: Path) -> None:
    import datasets

    write_rows(empty_hub / "some" / "rows")
    found = identities(["some/rows"])
    with offline_first(found):
        loaded = datasets.load_dataset("some/rows", "default", split="test", trust_remote_code=True, revision="main")
        assert loaded["text"] == ["row 0", "row 1", "row 2"]
    check_unchanged(found)
    write_rows(empty_hub / "some" / "rows", 4)
    assert identities(["some/rows"]) != found
    with pytest.raises(UserError, match="data set 'some/rows' below CAIRN_HUB is not what it was"):
        check_unchanged(found)


def test_what_is_nowhere_is_told(empty_hub: Path) -> None:
    import datasets

    with pytest.raises(UserError, match="dataset 'some/rows' was not found: not below CAIRN_HUB="):
        identities(["some/rows"])
    with offline_first({}), pytest.raises(UserError, match="dataset 'some/rows' was not found"):
        datasets.load_dataset("some/rows")


def test_a_split_or_a_configuration_that_is_not_in_a_local_copy(empty_hub: Path) -> None:
    import datasets

    write_rows(empty_hub / "some" / "rows")
    with offline_first({}), pytest.raises(UserError, match="data set 'some/rows' cannot be read from "):
        datasets.load_dataset("some/rows", "other")


def test_what_leads_out_of_the_folder_is_no_id(empty_hub: Path) -> None:
    with pytest.raises(UserError, match="is no id of a dataset"):
        identities(["../rows"])


def test_afterwards_everything_is_as_it_was(empty_hub: Path) -> None:
    import datasets

    before = datasets.load_dataset
    with pytest.raises(RuntimeError, match="in between"), offline_first({}):
        raise RuntimeError("in between")
    assert datasets.load_dataset is before

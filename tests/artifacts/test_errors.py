import errno
from pathlib import Path

import pytest

from artifacts.errors import explained
from artifacts.store import Store
from common.errors import UserError

KEY = "a" * 64


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "full", "/store/x"), "no space left at /store/x"),
        (OSError(errno.EDQUOT, "full"), "no space left at PLACE"),
        (PermissionError("Access Denied"), r"no access to PLACE \(Access Denied\)"),
        (OSError(errno.EROFS, "read-only", "/store/x"), "no access to /store/x .*read-only"),
        (ConnectionError("refused"), "cannot reach PLACE: refused"),
        (TimeoutError("too long"), "cannot reach PLACE: too long"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error: OSError, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught, explained("PLACE"):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "broken disk"), ValueError("a defect"), FileNotFoundError(2, "x")]
)
def test_anything_else_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained("PLACE"):
        raise error
    assert caught.value is error


@pytest.mark.usefixtures("s3_address")
def test_a_bucket_that_is_not_there_is_explained(tmp_path: Path) -> None:
    store = Store.open("s3://no-such-bucket/x")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no-such-bucket.*does not exist"), store.lease(KEY):
        pass
    with pytest.raises(UserError, match=r"no-such-bucket.*does not exist"):
        store.attach(KEY, tmp_path / "file", "file")

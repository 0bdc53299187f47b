"""How a unit ended, as it travels between processes and machines."""

import traceback
from collections.abc import Callable

from common.config import FrozenModel
from common.errors import StageFailed, UserError
from tasks.encoding.units import EncodedUnit, Unit


class Reply(FrozenModel):
    """What became of a unit: one of these."""

    encoded: EncodedUnit | None = None
    user_error: str | None = None
    """What the user can mend."""
    os_error: tuple[int, str, str | None] | None = None
    """The number, the text and the file of an OSError, so that a full disk is still known as one."""
    failure: str | None = None
    """The traceback of anything else."""

    @staticmethod
    def to(work: Callable[[], EncodedUnit]) -> "Reply":
        """Does the work, and catches what it raises."""
        try:
            return Reply(encoded=work())
        except UserError as error:
            return Reply(user_error=str(error))
        except OSError as error:
            if error.errno is None:
                return Reply(failure=traceback.format_exc())
            name = None if error.filename is None else str(error.filename)
            return Reply(os_error=(error.errno, error.strerror or "", name))
        except Exception:
            return Reply(failure=traceback.format_exc())

    def result(self, unit: Unit) -> EncodedUnit:
        """The encoded unit. Raises UserError, OSError or StageFailed as the work did."""
        if self.user_error is not None:
            raise UserError(self.user_error)
        if self.os_error is not None:
            raise OSError(*self.os_error)
        if self.encoded is None:
            raise StageFailed(f"documents {unit.name} were not encoded:\n{self.failure}")
        return self.encoded

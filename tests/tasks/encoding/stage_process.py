"""The stage `tokens` on a store, in a process that tests kill: `python -m tests.tasks.encoding.stage_process WORK`.

Works are JSON, as `tasks.work.Work` writes it. It ends with 0, with 130 where it was told to stop, and with 1 and the
error on its last line.
"""

import signal
import sys

from artifacts.store import Store
from common.errors import StageInterrupted
from tasks import tokens
from tasks.produce import produce
from tasks.work import Work


def main() -> int:
    work = Work.model_validate_json(sys.argv[1])
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda given, frame: stopped.append(given))
    # Small corpora stand for large ones here.
    tokens.WORTH_IT_BYTES, tokens.WORTH_A_PROCESS_BYTES = 0, 1  # type: ignore[attr-defined]
    try:
        outcome = produce(Store.open(work.store), work, lambda event: print(event, flush=True), lambda: bool(stopped))
    except StageInterrupted:
        return 130
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    print(outcome.record.output, outcome.record.metrics["units"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

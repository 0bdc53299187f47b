"""A process that encodes: `python -m tasks.encoding.worker REPLIES`, an order and then a unit per line of JSON on
standard input, a reply per unit on the file descriptor REPLIES.

When its parent is gone, standard input ends, and it is gone too, whatever it was doing.
"""

import os
import queue
import sys
import threading
from pathlib import Path

from common.config import FrozenModel
from tasks.encoding.reply import Reply
from tasks.encoding.units import EncodedUnit, Encoders, Job, Unit, encode_unit


class Order(FrozenModel):
    """What a process encodes."""

    job: Job
    documents: Path
    """The folder of the documents."""
    tokenizer: Path
    """The folder of the tokenizer."""
    output: Path
    """The folder that token shards are written to."""


def main(arguments: list[str]) -> int:
    """Encodes units until standard input ends."""
    import pyarrow as pa

    replies = int(arguments[0])
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    order = Order.model_validate_json(lines.get())
    encoders: list[Encoders] = []

    def encode(unit: Unit) -> EncodedUnit:
        if not encoders:
            encoders.append(Encoders.load(order.job, order.tokenizer, parallel=False))
        encoded = encode_unit(unit, str(order.documents / unit.name), order.job, encoders[0], order.output)
        # With the system's allocator, this gives back everything that glibc keeps.
        pa.default_memory_pool().release_unused()
        return encoded

    while True:
        unit = Unit.model_validate_json(lines.get())
        reply = Reply.to(lambda unit=unit: encode(unit))  # type: ignore[misc]
        data = memoryview(reply.model_dump_json().encode() + b"\n")
        while data:
            data = data[os.write(replies, data) :]


def _read(lines: "queue.Queue[bytes]") -> None:
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            lines.put(line)
    # At once: what it has half written is done again by whoever goes on.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

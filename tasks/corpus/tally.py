"""What became of documents, in numbers.

D documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.config import Config
from tasks.corpus.examining import KEPT
from tasks.corpus.sources import REFUSALS, Count, Refused


def described_rules(config: Config, benchmarks: Sequence[str]) -> list[dict[str, Any]]:
    """What drops documents after they were read, in the order in which it applies, with its parameters."""
    rules: list[dict[str, Any]] = [
        {"rule": rule.rule, "parameters": rule.model_dump(exclude={"rule"})} for rule in config.rules
    ]
    if config.contamination is not None:
        ngram = config.contamination.ngram
        rules += [{"rule": "contamination", "parameters": {"benchmark": name, "ngram": ngram}} for name in benchmarks]
    if config.duplicates is not None and config.duplicates.exact:
        rules.append({"rule": "exact_duplicates", "parameters": {}})
    if config.duplicates is not None and config.duplicates.near is not None:
        rules.append({"rule": "near_duplicates", "parameters": config.duplicates.near.model_dump()})
    return rules


@dataclass
class Tally:
    """What was read, dropped and kept so far."""

    dropped: list[Count]
    """By rule, by benchmark, as equal and as near duplicates: see described_rules."""
    batches: int = 0
    """Batches of the source that are done with."""
    file: int = 0
    """The number of a file that a batch begins with, from which the source can be read on."""
    file_batch: int = 0
    """That batch's number."""
    read: Count = field(default_factory=Count)
    kept: Count = field(default_factory=Count)
    refused: Refused = field(default_factory=Refused)
    """What was dropped while reading."""
    enough: bool = False
    """Whether as much is kept as is wanted, so that the rest of the source is not."""

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Tally":
        """The tally that `asdict` gave."""
        refused = state["refused"]
        return cls(
            dropped=[Count(**count) for count in state["dropped"]],
            batches=state["batches"],
            file=state["file"],
            file_batch=state["file_batch"],
            read=Count(**state["read"]),
            kept=Count(**state["kept"]),
            refused=Refused({rule: Count(**count) for rule, count in refused["counts"].items()}, refused["damaged"]),
            enough=state["enough"],
        )

    def count(self, reason_D: NDArray[np.int16], size_D: NDArray[np.int64]) -> None:
        """Counts documents of some bytes by what drops them, the number of a rule or KEPT."""
        self.read.add(len(reason_D), int(size_D.sum()))
        kinds = len(self.dropped) + 1
        documents = np.bincount(reason_D - KEPT, minlength=kinds).tolist()
        sizes = np.bincount(reason_D - KEPT, size_D, kinds).astype(np.int64).tolist()
        for count, number, size in zip([self.kept, *self.dropped], documents, sizes, strict=True):
            count.add(number, size)

    def refuse(self, refused: Refused) -> None:
        """Counts what was dropped while reading."""
        self.refused.merge(refused)
        for count in refused.counts.values():
            self.read.add(count.documents, count.bytes)

    def described(self, rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What was dropped, in the order in which rules apply; bad input only where there was some."""
        counts = self.refused.counts
        refused = [{"rule": rule, "parameters": {}, **asdict(counts[rule])} for rule in REFUSALS if rule in counts]
        return [*refused, *({**rule, **asdict(count)} for rule, count in zip(rules, self.dropped, strict=True))]

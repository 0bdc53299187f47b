"""Arithmetic problems as a source of documents: expressions evaluated from left to right."""

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from tasks.corpus.sources import TEXT, Split
from tasks.problems import Problems, ProblemSource

if TYPE_CHECKING:
    import pyarrow as pa


class ArithmeticSource(ProblemSource):
    """Problems such as `554+456=` with their answers."""

    kind: Literal["arithmetic"]
    """The generator."""
    operands: int = Field(default=2, ge=2, le=8)
    """Operands of a problem."""
    reversed_answers: bool = False
    """Whether answers are written from their last digit to their first (Lee et al., arXiv 2307.03381)."""

    @property
    def operand_count(self) -> int:
        """Operands of a problem."""
        return self.operands

    @property
    def own_columns(self) -> tuple[str, ...]:
        """The two parts of the text: evaluation gives a model the prompt, and wants the target."""
        return ("prompt", "target")

    def table(self, problems: Problems, split: Split, random: np.random.Generator) -> "pa.Table":
        """Each problem as text: prompt `554+456=`, target `1010`, text `554+456=1010`."""
        # Imported here because it takes a third of a second, and planning needs only the configs.
        import pyarrow as pa

        columns: dict[str, list[str]] = {TEXT: [], "prompt": [], "target": []}
        for operands, operators, answer in zip(*(column.tolist() for column in problems), strict=True):
            symbols = (self.operators[index] for index in operators)
            prompt = str(operands[0]) + "".join(f"{s}{x}" for s, x in zip(symbols, operands[1:], strict=True)) + "="
            target = str(answer)[::-1] if self.reversed_answers else str(answer)
            for column, value in zip(columns.values(), (prompt + target, prompt, target), strict=True):
                column.append(value)
        return pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})

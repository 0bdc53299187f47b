"""The lineage of an artifact: everything that it was made from, as text, JSON or a page."""

from collections.abc import Iterator
from typing import Any

from artifacts.record import Record
from artifacts.store import Store
from common.config import FrozenModel

SHORT = 8


class Node(FrozenModel):
    """One artifact in a lineage."""

    key: str
    """The key of its record."""
    output: str
    """The digest of its content, as it was used."""
    record: Record | None
    """Its record, or null where that is gone or damaged."""
    names: tuple[str, ...]
    """The names that point at it."""
    inputs: dict[str, "Node"]
    """What it was made from, by the input's name; empty where it is repeated."""
    repeated: bool
    """Whether its inputs are shown at an earlier place."""

    @property
    def label(self) -> str:
        """What to call it: its first name, or its stage's name in the recipe."""
        return self.names[0] if self.names else self.record.name if self.record else "missing"

    @property
    def remade(self) -> bool:
        """Whether its key was made again since, with other content than was used here."""
        return self.record is not None and self.record.output != self.output


def tree(store: Store, record: Record) -> Node:
    """The lineage of a record down to its sources; what is shared is expanded at its first appearance only."""
    names: dict[str, list[str]] = {}
    for name, key in store.names().items():
        names.setdefault(key, []).append(name)
    return _node(store, record, (record.key, record.output), names, set())


def _node(
    store: Store, record: Record | None, used: tuple[str, str], names: dict[str, list[str]], seen: set[str]
) -> Node:
    key, output = used
    repeated = key in seen
    # Marked before its inputs are followed, so that records from elsewhere that form a ring end too.
    seen.add(key)
    inputs = {}
    if record is not None and not repeated:
        for name, reference in sorted(record.inputs.items()):
            source = store.read_record(reference.key)
            inputs[name] = _node(store, source, (reference.key, reference.digest), names, seen)
    named = tuple(sorted(names.get(key, ())))
    return Node(key=key, output=output, record=record, names=named, inputs=inputs, repeated=repeated)


def to_text(root: Node) -> str:
    """The lineage as an indented tree, one line per artifact."""
    # A record from elsewhere may hold sequences that terminals obey.
    return "\n".join(
        "".join(char if char.isprintable() else "�" for char in line) for line in _lines(root, root.label, "", "")
    )


def _lines(node: Node, title: str, first: str, rest: str) -> Iterator[str]:
    yield f"{first}{title}  {summary(node)}"
    children = list(node.inputs.items())
    for index, (name, child) in enumerate(children):
        last = index == len(children) - 1
        branch, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        yield from _lines(child, f"{name}: {child.label}", rest + branch, rest + below)


def summary(node: Node) -> str:
    """What one line says of an artifact after its title: stage, short key, what was made, remarks."""
    parts = [node.record.stage if node.record else "record is gone", node.key[:SHORT]]
    if node.repeated:
        return "  ".join([*parts, "(see above)"])
    if node.record is not None and node.record.summary:
        parts.append(f"({node.record.summary})")
    if node.remade:
        parts.append(f"(made again since; used was {node.output[:SHORT]})")
    return "  ".join(parts)


def walk(root: Node) -> Iterator[Node]:
    """Every artifact of a lineage once, in the order of the text."""
    if not root.repeated:
        yield root
        for child in root.inputs.values():
            yield from walk(child)


def to_json(root: Node) -> dict[str, Any]:
    """The lineage as plain JSON: `root`, and under `artifacts` each one's record, names and inputs by key."""
    artifacts = {}
    for node in walk(root):
        record = node.record.model_dump(mode="json") if node.record else None
        inputs = {name: {"key": child.key, "digest": child.output} for name, child in node.inputs.items()}
        artifacts[node.key] = {"label": node.label, "names": list(node.names), "inputs": inputs, "record": record}
    return {"root": root.key, "artifacts": artifacts}

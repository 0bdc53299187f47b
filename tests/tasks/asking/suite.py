"""A suite of three small categories, which tests lay out in a folder of their own."""

from pathlib import Path

SUITE = {
    "geography": r"""
category: geography
kind: knowledge
questions:
  - ask: What is the capital of France?
    answer: {regex: '\bParis\b'}
  - ask: Which is the largest ocean?
    answer: {exact: [the Pacific Ocean, Pacific]}
  - ask: Name two countries of Scandinavia.
    answer: {set: [Norway, Sweden, Denmark], others: [Germany], at_least: 2}
""",
    "code-function": """
category: code-function
kind: code
questions:
  - ask: Write a Python function `double(x)` that returns twice x.
    answer: {python: {function: double, cases: [{arguments: [3], returns: 6}, {arguments: [-1], returns: -2}]}}
""",
    "poetry": """
category: poetry
kind: creation
questions:
  - ask: |
      Write a short poem about the sea.
    answer:
      form:
        {min_lines: 3, max_lines: 20, min_words: 12, max_words: 200, contains: [sea, wave], at_least: 1,
         min_distinct: 0.5, starts_with: null, matches: null}
  - ask: What is 17 + 25?
    answer: {numeric: 42}
""",
}


def write_suite(folder: Path, **more: str) -> Path:
    """The suite, with further files or others in place of its own."""
    folder.mkdir(exist_ok=True)
    for name, text in {**SUITE, **more}.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder

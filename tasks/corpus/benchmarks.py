"""The benchmarks that models are tested on: where they lie, and the texts of their rows."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any, Self

from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError, one_line, suggestion
from tasks.corpus.digests import files_digest
from tasks.corpus.file_source import names_below
from tasks.hub import HUB_VARIABLE, hub_folder, local_copy, not_found


class Benchmark(FrozenModel):
    """The rows of a data set on the hub that models are tested on."""

    name: str | None = None
    """What it is called where documents are counted; null for its id."""
    id: str
    """The data set's id."""
    config: str | None = None
    """Its configuration; null where it has only one."""
    split: str = "test"
    """The split that models are tested on."""
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns whose texts are looked for, each text on its own; `choices.text` for a field of a column."""
    revision: str | None = None
    """The commit (40 hexadecimal digits) that is read from the network; null for the newest one."""
    digest: str | None = None
    """SHA-256 over the names and bytes of its files; Cairn fills it in where they are on this machine, and refuses
    files that are not what it says."""

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name or self.id

    def resolved(self) -> Self:
        """The benchmark with the digest of its local copy, where there is one.

        Raises UserError where it has to be one and is not there, or is not what the digest says.
        """
        folder = local_copy("dataset", self.id)
        if folder is None:
            if self.digest is not None:
                where = f"below {HUB_VARIABLE}={hub_folder()}" if hub_folder() else f"here: {HUB_VARIABLE} is not set"
                raise UserError(
                    f"benchmark '{self.title}' ({self.id}) is not {where}, and its digest is that of a copy"
                )
            return self
        digest = files_digest({name: folder / name for name in sorted(names_below(folder))})
        if self.digest not in (None, digest):
            raise UserError(
                f"benchmark '{self.title}' in {folder} is not what its digest {self.digest[:12]} says ({digest[:12]}): "
                "it has changed; run again, and take the digest out of the recipe where it was written there"
            )
        return self.model_copy(update={"digest": digest})

    def texts(self) -> list[str]:
        """All texts of its rows, read below `CAIRN_HUB` or from the network.

        Raises UserError where it is in neither place, or has no such configuration, split or column.
        """
        import datasets

        folder = local_copy("dataset", self.id)
        # Neither place can be taken for the other: a folder's path is absolute.
        place = str(folder) if folder else f"hf://datasets/{self.id}"
        revision = None if folder else self._commit()
        with TemporaryDirectory() as cache_folder:
            try:
                builder = datasets.load_dataset_builder(place, self.config, revision=revision, cache_dir=cache_folder)
                splits = builder.config.data_files
                if self.split not in splits:
                    known = suggestion(self.split, map(str, splits))
                    raise UserError(f"benchmark '{self.title}' ({self.id}) has no split '{self.split}'{known}")
                return list(self._texts(builder.as_streaming_dataset(split=self.split)))
            except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
                problem = f"benchmark '{self.title}' ({self.id}) cannot be read from {place}: {one_line(error)}"
                raise UserError(problem) from error

    def _commit(self) -> str:
        import huggingface_hub

        try:
            return str(huggingface_hub.HfApi().dataset_info(self.id, revision=self.revision).sha)
        except Exception as error:  # the network has as many errors as libraries
            raise not_found("dataset", self.id, one_line(error)) from error

    def _texts(self, rows: Iterator[Mapping[str, Any]]) -> Iterator[str]:
        for row in rows:
            for column in self.columns:
                yield from self._strings(row, column.split("."), column)

    def _strings(self, value: Any, path: Sequence[str], column: str) -> Iterator[str]:
        """The strings in a value, or in a field of it."""
        if value is None:
            return
        if isinstance(value, list):
            for inner in value:
                yield from self._strings(inner, path, column)
        elif path and isinstance(value, Mapping):
            if path[0] not in value:
                known = suggestion(path[0], value)
                raise UserError(f"benchmark '{self.title}' ({self.id}) has no column '{column}'{known}")
            yield from self._strings(value[path[0]], path[1:], column)
        elif isinstance(value, str) and not path:
            yield value
        else:
            kind = type(value).__name__
            raise UserError(f"benchmark '{self.title}' ({self.id}): the column '{column}' has no texts but {kind}")


@cache
def known_benchmarks() -> Mapping[str, Benchmark]:
    """The benchmarks that are known by name, with the splits that lm-evaluation-harness tests on."""
    rows = (
        ("agieval_aqua_rat", "hails/agieval-aqua-rat", None, "test", ("query", "choices")),
        ("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", "test", ("question", "choices.text")),
        ("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", ("question", "choices.text")),
        ("boolq", "aps/super_glue", "boolq", "validation", ("question", "passage")),
        ("commonsense_qa", "tau/commonsense_qa", None, "validation", ("question", "choices.text")),
        ("copa", "aps/super_glue", "copa", "validation", ("premise", "choice1", "choice2")),
        ("gsm8k", "openai/gsm8k", "main", "test", ("question", "answer")),
        ("hellaswag", "Rowan/hellaswag", None, "validation", ("ctx", "endings")),
        ("openbookqa", "allenai/openbookqa", "main", "test", ("question_stem", "choices.text")),
        (
            "truthfulqa",
            "truthfulqa/truthful_qa",
            "multiple_choice",
            "validation",
            ("question", "mc1_targets.choices", "mc2_targets.choices"),
        ),
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", "test", ("text",)),
        ("winogrande", "allenai/winogrande", "winogrande_xl", "validation", ("sentence",)),
        ("wsc273", "ErnestSDavis/winograd_wsc", "wsc273", "test", ("text",)),
    )
    return {
        name: Benchmark(name=name, id=id_, config=config, split=split, columns=columns)
        for name, id_, config, split, columns in rows
    }

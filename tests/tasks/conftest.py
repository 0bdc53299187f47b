"""What tests of stages share: running one into a folder, with nothing around it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tasks.registry import stage_named
from tasks.stage import Context, Metrics, Runtime

RunStage = Callable[..., tuple[Path, Metrics]]


def context_in(
    place: Path, name: str, inputs: Mapping[str, Path] | None = None, labels: Mapping[str, str] | None = None
) -> Context:
    """What a stage is run with, all below a folder; its checkpoints stay there for a second run."""
    context = Context(
        name=name,
        output=place / "output",
        logs=place / "logs",
        scratch=(fsspec.filesystem("file"), str(place / "scratch")),
        local_scratch=place / "scratch",
        runtime=Runtime(),
        report=lambda event: None,
        lineage="- documents `0123456789ab`",
        labels=labels or {},
        fetch=lambda input_name, file_name: (inputs or {})[input_name] / file_name,
    )
    context.output.mkdir(parents=True)
    context.logs.mkdir()
    return context


@pytest.fixture
def run_stage(tmp_path: Path) -> RunStage:
    """Runs a stage by its name on a config and input folders; gives its output folder and metrics."""
    runs = iter(range(1000))

    def run(
        name: str, config: Mapping[str, Any], labels: Mapping[str, str] | None = None, **inputs: Path
    ) -> tuple[Path, Metrics]:
        stage = stage_named(name)
        context = context_in(tmp_path / f"{next(runs)}-{name}", name, inputs, labels)
        return context.output, stage.run(stage.config.model_validate(config), inputs, context)

    return run


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CAIRN_HUB with nothing in it, and no network to ask instead."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setenv("CAIRN_HUB", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def hidden_task(empty_hub: Path) -> str:
    """A task of lm-eval that names its data in code, with data of the test's."""
    folder = empty_hub / "gplsi" / "cieacova"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: multiple_choice\n  data_files:\n"
        "  - {split: train, path: rows.jsonl}\n  - {split: test, path: rows.jsonl}\n---\n"
    )
    facts = ("Anotador", "Año", "Dificultad", "Fuente", "Idioma", "Mes", "N. Pregunta", "Sección")
    row = {
        **dict.fromkeys(("Tarea", "Instrucción", "Pista", "Pregunta", "Prompt"), "?"),
        "Respuesta": ["sí"],
        "Opciones": ["sí", "no"],
        "Metadata": dict.fromkeys(facts, "C1"),
        "Subtarea": "text",
    }
    (folder / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    return "cieacova_choice"

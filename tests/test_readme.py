"""The README names what is there."""

import re
from pathlib import Path

import typer

from flows.cli import app
from flows.recipe import known_recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("common", "artifacts", "models", "tasks", "flows")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_tree_has_every_file_and_no_other() -> None:
    told = dict(re.findall(r"^(\w+)/ (.*?)(?=^\w|^```)", section("The tree"), re.MULTILINE | re.DOTALL))
    for package in PACKAGES:
        # Two spaces are before each; names in a phrase have one.
        entries = re.findall(r"  (\w+(?:\.py|/))(?= )", told[package])
        names = [path.name + "/" * path.is_dir() for path in (ROOT / package).iterdir()]
        assert sorted(entries) == sorted(set(names) - {"__init__.py", "__pycache__/"}), package


def test_the_tables_have_every_command_and_recipe() -> None:
    commands = re.findall(r"`cairn ([a-z]+)", section("The command").split("A `REF` is")[0])
    assert set(commands) == set(typer.main.get_group(app).commands)
    recipes = [re.findall(r"`([\w-]+)`", row) for row in re.findall(r"^\| (`.*?) \|", section("Recipes"), re.MULTILINE)]
    whole = [name if name[0] != "-" else names[0].split("-")[0] + name for names in recipes for name in names]
    assert sorted(whole) == sorted(known_recipes())

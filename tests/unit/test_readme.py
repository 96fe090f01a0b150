"""What the documentation says is what there is: its settings, operations, commands, files and links."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_group

import tasks  # noqa: F401 - its import makes the operations known
from worker.cli.main import app as cli
from worker.engine import kinds
from worker.settings import Settings

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMPUTED = {"host": "(this machine's short name)"}
"""Defaults that differ from machine to machine, as the table words them."""


def settings_table() -> str:
    """The README's table of settings. To renew it: `python -m tests.unit.test_readme`."""
    defaults = Settings.model_construct().model_dump(mode="json")
    rows = [
        f"| `VIRTFLEET_{name.upper()}` | {COMPUTED.get(name, _shown(defaults[name]))} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | what it is |", "|---|---|---|", *rows])


def _shown(value: Any) -> str:
    """A default as one would write it into the variable."""
    if value is None:
        return "(none)"
    if isinstance(value, float):
        return f"`{value:.15g}`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def test_settings_table_equals_the_settings() -> None:
    assert settings_table() in README.read_text(), f"README.md needs this table:\n\n{settings_table()}\n"


def test_every_operation_is_in_the_readme() -> None:
    text = README.read_text()
    names = [name.removeprefix("virtfleet.") for name in kinds._kinds if name.startswith("virtfleet.")]
    missing = [name for name in names if f"`{name}`" not in text]
    assert not missing, f"README.md does not name the operations {missing}"


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text()
    missing = sorted(name for name in get_group(cli).commands if f"`virtfleet {name}" not in text)
    assert not missing, f"README.md does not name the commands {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    named = re.findall(r"`((?:worker|tasks|tests|scripts|deploy|docs|requirements)/[\w./-]+)`", text)
    missing = sorted({link for link in links if not (page.parent / link).exists()})
    missing += sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing, f"{page.name} names what is not there: {missing}"


if __name__ == "__main__":
    print(settings_table())  # noqa: T201 - to be pasted into README.md

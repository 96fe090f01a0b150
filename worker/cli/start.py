"""Where the command begins: settings first, since the Celery application reads them as it is imported."""

from __future__ import annotations

import re
import sys

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from typer.exceptions import TyperException

from worker import logs
from worker.cli import output
from worker.errors import InvalidSpec
from worker.models import explain
from worker.settings import get_settings


def main() -> None:
    """Run the command; a setting that cannot be is a user's mistake and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot write, by its encoding or because it is no text, it shall show escaped.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logs.configure("warning")
    try:
        get_settings()
    except (ValidationError, SettingsError) as error:
        output.tell(_wrong_settings(error).as_dict(), as_json="--json" in sys.argv)
        raise SystemExit(output.BAD_INPUT) from None
    from worker.cli.main import app  # noqa: PLC0415 - see above

    if "--json" in sys.argv:
        raise SystemExit(_for_programs(app))
    app()


def _for_programs(app: typer.Typer) -> int:
    """Run the command; wrong usage is told in JSON like every other mistake."""
    try:
        return app(standalone_mode=False) or output.OK
    except TyperException as error:
        wrong = InvalidSpec(error.format_message(), hint="See --help.")
        output.tell(wrong.as_dict(), as_json=True)
        return output.BAD_INPUT


def _wrong_settings(error: ValidationError | SettingsError) -> InvalidSpec:
    """The settings that are wrong, by the names of their environment variables."""
    if isinstance(error, SettingsError):  # what should be JSON is none; only the message tells which setting
        field = re.search(r'field "(\w+)"', str(error))
        wrong = [{"field": field[1] if field else "?", "allowed": 'allowed: JSON, such as ["a", "b"] or {"a": "b"}'}]
    else:
        wrong = explain(error).details["fields"]
    lines = [
        f"VIRTFLEET_{one['field'].upper()}: {one['allowed']}" + (f" (given: {one['given']})" if "given" in one else "")
        for one in wrong
    ]
    return InvalidSpec("; ".join(lines), hint="Correct these environment variables, or unset them.", fields=wrong)

"""The kinds of operations there are: each has a name, the form of its request, and a function for its canvas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from worker.app import app
from worker.engine.canvas import Canvas
from worker.engine.record import Record
from worker.engine.requests import Request

Asked = TypeVar("Asked", bound=Request)


@dataclass(frozen=True)
class Operation(Generic[Asked]):
    """An operation as its canvas is built: what was asked, for which instance, on which host."""

    id: str
    request: Asked
    instance: str
    uuid: str
    host: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind(Generic[Asked]):
    """A kind of operation: its name, the form of its request, and its canvas."""

    name: str
    request: type[Asked]
    build: Callable[[Operation[Asked]], Canvas]

    def of(self, record: Record) -> Operation[Asked]:
        """The operation of a record, as it was when it was admitted."""
        request = self.request.model_validate(record.request)
        return Operation(record.id, request, record.instance, record.uuid, record.host, record.details)


_kinds: dict[str, Kind[Any]] = {}


def kind_of(name: str) -> Kind[Any]:
    """The kind of that name."""
    if name not in _kinds:
        app.loader.import_default_modules()
    return _kinds[name]


def kind_for(request: Request) -> Kind[Any]:
    """The kind that a request of this form asks for."""
    app.loader.import_default_modules()
    return next(kind for kind in _kinds.values() if kind.request is type(request))


def add_kind(kind: Kind[Any]) -> None:
    """Make a kind known."""
    _kinds[kind.name] = kind

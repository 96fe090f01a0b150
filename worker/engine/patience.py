"""Waiting for Redis as long as it takes: what was done on a host must not be forgotten, nor done twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tenacity import retry, retry_if_exception_type, wait_random_exponential

from worker.errors import BrokerUnavailable

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def patiently(call: Callable[Arguments, Returned], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
    """Call until Redis answers. Only for calls that may be repeated."""
    attempt = retry(
        retry=retry_if_exception_type(BrokerUnavailable), wait=wait_random_exponential(multiplier=0.1, max=2)
    )
    return attempt(call)(*args, **kwargs)

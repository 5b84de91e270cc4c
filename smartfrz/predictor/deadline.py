"""`call_within`: a call that is given up when it takes too long."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread of its own, and wait for it no longer than the deadline.

    A thread cannot be ended from outside: a call that is given up may go on in the background. It does not keep the
    process from ending.

    Args:
        seconds: The deadline, in seconds.
        function: What to call.

    Returns:
        What the function returned.

    Raises:
        TimeoutError: If it has not returned in time. What the function itself raises is raised as it is.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no end after {seconds:g} s")
    result: T = results[0]
    return result

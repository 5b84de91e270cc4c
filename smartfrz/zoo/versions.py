"""Versions of predictors: up to three numbers."""


def version_key(version: str) -> tuple[int, ...]:
    """Return a sort key in which 1 and 1.0 are equal."""
    numbers = [int(number) for number in version.split(".")]
    while numbers[1:] and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)

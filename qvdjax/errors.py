"""The one exception that means "the user can mend this": what was wrong, where, and what to do."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the input, said in one line.

    Args:
        message: What was wrong and where, without a full stop at the end.
        remedy: What to do about it.
        items: The names concerned where there are many (keys, files). The text shows their number and the
            first three; programs read all of them from `items`.

    Attributes:
        exit_code: What a program that ends on it returns.
    """

    exit_code = 2

    def __init__(self, message: str, *, remedy: str, items: Sequence[str] = ()):
        self.message = message
        self.remedy = remedy
        self.items = tuple(items)
        super().__init__(message)

    def __str__(self) -> str:
        names = ""
        if self.items:
            more = ", ..." if len(self.items) > 3 else ""
            names = f" ({len(self.items)}: {', '.join(self.items[:3])}{more})"
        return " ".join(f"{self.message}{names}; {self.remedy}".split())

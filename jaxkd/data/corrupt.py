"""Images that cannot be read: counted, named, and an error when they are too many."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxkd.errors import ConfigError

_NAMED = 5  # how many an error names; all of them are in `found`


class CorruptImages:
    """What could not be read of a data set; one object for all of its parts.

    Args:
      limit: how many images may be corrupt.

    Attributes:
      found: why each could not be read, by name, in the order in which they were met.
    """

    def __init__(self, limit: int = 0):
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            why = 'it must be a whole number of at least 0'
            raise ConfigError('data.corrupt_limit', limit, why=why)
        self._limit = limit
        self._tell: Callable[[Mapping[str, str]], None] = lambda new: None
        self.found: dict[str, str] = {}

    def add(self, images: Mapping[str, str]) -> None:
        """Remembers images, by name why they cannot be read.

        Raises:
          ConfigError: when there are more than the limit.
        """
        new = {name: why for name, why in images.items() if name not in self.found}
        if not new:
            return
        self.found |= new
        self._tell(new)
        if len(self.found) > self._limit:
            named = [f'{name} ({why})' for name, why in self.found.items()]
            more = f' and {len(named) - _NAMED} more' if len(named) > _NAMED else ''
            raise ConfigError(
                'data.corrupt_limit',
                self._limit,
                why=f'{", ".join(named[:_NAMED])}{more} cannot be read; repair them, allow for '
                'more or, before a run has begun, remove them',
            )

    def listen(self, tell: Callable[[Mapping[str, str]], None]) -> None:
        """Has `tell` called with what was found so far, if anything, and with what will be."""
        self._tell = tell
        if self.found:
            tell(self.found)

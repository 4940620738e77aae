"""What the benchmarks share: one line for a user's error."""

import sys
from collections.abc import Callable

from arctrm.errors import UserError


def guarded(main: Callable[[], None]) -> None:
    """Run a script; an error of its user is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

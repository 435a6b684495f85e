"""How a command of this room starts: one folder, and a mistake is one sentence, exit code 2."""

import sys
from collections.abc import Callable
from pathlib import Path


def command(work: Callable[[Path], None]) -> None:
    """Run `work` on the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m analysis.figures, analysis.report or analysis.readme FOLDER, such as outputs/mini")
    try:
        work(Path(sys.argv[1]))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

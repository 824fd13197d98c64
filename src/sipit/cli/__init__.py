"""The command line: parse, call one public function, print.

Standard output carries the result, standard error everything else. Exit codes: 0 recovered or
holds; 1 not recovered or does not hold; 2 bad usage or input, with one sentence; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sipit.cli.arguments import parser
from sipit.cli.messages import say
from sipit.errors import SipitError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = parser().parse_args(argv)
        code: int = options.run(options)
    except SipitError as error:
        say(f"sipit: {error}")
        return 2
    except KeyboardInterrupt:
        print("sipit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 1
    return code

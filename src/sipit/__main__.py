"""Run the command line: `python -m sipit`."""

import sys

from sipit.cli import main

if __name__ == "__main__":
    sys.exit(main())

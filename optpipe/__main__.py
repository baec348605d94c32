"""``python -m optpipe``: see cli.py."""

import sys

from optpipe.cli import main

if __name__ == "__main__":  # the guard lets the benchmark spawn worker processes
    sys.exit(main())

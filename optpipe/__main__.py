"""``python -m optpipe``: see cli.py."""

import sys

if __name__ == "__main__":  # not in a worker, which the benchmark spawns by importing this again
    from optpipe.cli import main

    sys.exit(main())

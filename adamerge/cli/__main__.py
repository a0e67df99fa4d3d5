"""`python -m adamerge.cli`, the same as `adamerge`."""

import sys

from adamerge.cli.command import main

if __name__ == "__main__":
    sys.exit(main())

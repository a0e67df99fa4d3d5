"""Learn a merge and export it: `python train.py key=value …`, the same as `adamerge train …`."""

import sys

from adamerge.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

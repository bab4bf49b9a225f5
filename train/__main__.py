"""`torchrun -m train RECIPE key=value …`: the same as `rorqual train`, for launchers."""

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""`python -m mpo` is `mpo`; for starters that take a module, such as torchrun."""

import sys

from mpo.commands import main

if __name__ == "__main__":
    sys.exit(main())

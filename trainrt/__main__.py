"""`python -m trainrt`."""

import sys

from trainrt.cli import main

if __name__ == "__main__":
    sys.exit(main())

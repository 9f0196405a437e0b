"""`python -m app`: the command line, and with no command the page."""

import sys

from app.cli import main

if __name__ == "__main__":
    sys.exit(main())

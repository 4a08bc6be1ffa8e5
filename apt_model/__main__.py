"""`python -m apt_model`: the command line."""

import sys

from apt_model.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

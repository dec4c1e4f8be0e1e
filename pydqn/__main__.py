"""`python -m pydqn` is the `pydqn` command."""

import sys

from pydqn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

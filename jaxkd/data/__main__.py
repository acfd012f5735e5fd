"""`python -m jaxkd.data`."""

import sys

from jaxkd.data.command import main

if __name__ == '__main__':
    sys.exit(main())

"""`python -m jaxkd.convert`."""

import sys

from jaxkd.convert.command import main

if __name__ == '__main__':
    sys.exit(main())

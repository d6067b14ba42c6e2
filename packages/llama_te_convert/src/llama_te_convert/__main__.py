"""`python -m llama_te_convert` is the command `llama-te-convert`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

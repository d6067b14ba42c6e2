"""`python -m llama_te_infer.serve`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())

"""`torchrun -m llama_te_core.train`."""

import sys

from .command import main

sys.exit(main())

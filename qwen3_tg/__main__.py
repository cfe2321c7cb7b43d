"""`python -m qwen3_tg` is the command `qwen3`."""

import sys

from qwen3_tg.cli import main

sys.exit(main())

"""The experiments: cells, tables of cells, and the commands that run them."""

import logging

# It warns on every import that an optional CPU kernel package is absent.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

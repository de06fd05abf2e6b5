"""`python -m specauf_jax`."""

import sys

from specauf_jax.cli import main

sys.exit(main())

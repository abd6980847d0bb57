"""`python -m fused_route.training`: the command fused-route, for launchers of many processes."""

import sys

from fused_route.training.cli import command

sys.exit(command())

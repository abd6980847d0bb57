"""`python -m fused_route.training`: the command fused-route, for launchers of many processes."""

import sys

from fused_route.training.cli import main

sys.exit(main())

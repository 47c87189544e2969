"""`python -m lora_vision`: the command line without an installed script."""

import sys

from lora_vision.cli import main

sys.exit(main())

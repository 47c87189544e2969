"""``python -m lora_vision``: the command line where the ``lora-vision`` program is not on the path."""

import sys

from lora_vision.cli import main

sys.exit(main())

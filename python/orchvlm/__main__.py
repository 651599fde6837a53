"""``python -m orchvlm`` is the ``orchvlm`` command."""
import sys

from .cli import main

sys.exit(main())

"""``python -m bascule.runtime.cli``."""

from bascule.runtime.cli.app import main

main()

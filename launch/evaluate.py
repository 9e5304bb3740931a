"""The command ``shodh evaluate``."""

from shodh.commands.evaluate import main
from shodh.core.cli import run_main

if __name__ == "__main__":
    run_main(main)

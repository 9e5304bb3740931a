"""The command ``shodh convert-data``."""

from shodh.commands.convert_data import main
from shodh.core.cli import run_main

if __name__ == "__main__":
    run_main(main)

"""The command ``shodh inspect``."""

from shodh.commands.inspect import main
from shodh.core.cli import run_main

if __name__ == "__main__":
    run_main(main)

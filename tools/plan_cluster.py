"""The command ``shodh plan``."""

from shodh.commands.plan import main
from shodh.core.cli import run_main

if __name__ == "__main__":
    run_main(main)

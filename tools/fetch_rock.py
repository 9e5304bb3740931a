"""The command ``shodh fetch-rock``."""

from shodh.commands.fetch_rock import main
from shodh.core.cli import run_main

if __name__ == "__main__":
    run_main(main)

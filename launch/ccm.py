"""The command ``shodh ccm``."""

from shodh.commands import run_command

if __name__ == "__main__":
    run_command("ccm")

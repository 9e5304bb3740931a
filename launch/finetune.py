"""The command ``shodh finetune``."""

from shodh.commands import run_command

if __name__ == "__main__":
    run_command("finetune")

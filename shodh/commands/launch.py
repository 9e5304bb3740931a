"""Start a command on many ranks, here or over ssh: DeepSpeed's launcher, with its faults said before it starts.

What it does not do by itself: refuse a hostfile that is missing or too short, name the nodes that ssh does not reach,
skip comments in .deepspeed_env, forward NCCL_* from a machine without a GPU, choose a port, and end only this job.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shodh.core.cli import command_parser
from shodh.core.errors import ConfigError, TopologyError
from shodh.core.reading import read_text

EXAMPLES = """examples:
  shodh launch --num_gpus 2 pretrain --config demo --set parallel.ep_size=2          two ranks on this machine
  shodh launch --hostfile launch/hostfile pretrain --config launch/configs/h100_multinode.yaml --resume auto
"""
FORWARDED = ("NCCL_", "TORCH_NCCL_", "SHODH_")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=3"  # ssh ends, and names the node, 45 s after its last answer


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of DeepSpeed's launcher, and the command with its own."""
    from shodh.commands import COMMANDS

    ranks = [name for name, command in COMMANDS.items() if command.ranks]
    place = next((number for number, argument in enumerate(argv) if argument in ranks), None)
    if place is None:
        raise ConfigError(f"shodh launch needs a command to start: one of {', '.join(ranks)}")
    return list(argv[:place]), list(argv[place:])


def read_variables(path: Path) -> dict[str, str]:
    """``NAME=VALUE`` of each line of a .deepspeed_env; lines that are empty or begin with # are skipped."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(path, "file of variables").splitlines(), start=1):
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"{path}, line {number}: expected NAME=VALUE, a comment or nothing, not {line.strip()!r}")
        found[name.strip()] = value.strip()
    return found


def forwarded(environment: Mapping[str, str], paths: Sequence[Path]) -> dict[str, str]:
    """Variables that all nodes get beside those that DeepSpeed forwards."""
    found = {name: value for name, value in environment.items() if name.startswith(FORWARDED)}
    for path in paths:
        if path.is_file():
            found |= read_variables(path)
    return found


def check_hosts(args: argparse.Namespace, runner: Any) -> list[str]:
    """The nodes to start on, none for this machine alone; raises `ConfigError`."""
    if not os.path.isfile(args.hostfile):
        if args.hostfile != runner.DLTS_HOSTFILE or args.num_nodes > 1 or args.include or args.exclude:
            raise ConfigError(f"hostfile {args.hostfile} is missing: a line a node, as in launch/hostfile.example")
        return []
    try:
        pool = runner.fetch_hostfile(args.hostfile)
        chosen = list(runner.parse_inclusion_exclusion(pool, args.include, args.exclude))
    except ValueError as error:
        raise ConfigError(f"hostfile {args.hostfile}: {error}") from error
    if args.num_nodes > len(chosen):
        raise ConfigError(f"--num_nodes {args.num_nodes}: {args.hostfile} has {len(chosen)}: {', '.join(chosen)}")
    if short := [host for host in chosen if args.num_gpus > pool[host]]:
        raise ConfigError(f"--num_gpus {args.num_gpus}: {short[0]} has slots={pool[short[0]]} in {args.hostfile}")
    return chosen[: args.num_nodes] if args.num_nodes > 0 else chosen


def check_reached(hosts: Sequence[str], port: int | None) -> None:
    """Refuse nodes that ssh does not reach in ten seconds, without a password."""

    def fails(host: str) -> bool:
        command = [*SSH, *(["-p", str(port)] if port else []), host, "true"]
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode != 0

    with ThreadPoolExecutor(64) as pool:
        lost = [host for host, failed in zip(hosts, pool.map(fails, hosts), strict=True) if failed]
    if lost:
        raise TopologyError(
            f"ssh does not reach {', '.join(lost)} ({len(lost)} of {len(hosts)} nodes) in 10 s without a password; "
            "mend it, or take the node out of the hostfile"
        )


def adapt(runner: Any, variables: Mapping[str, str]) -> None:
    """Let DeepSpeed's ssh runner export these, read no file of its own, and end no job but its own."""

    class Runner(runner.PDSHRunner):  # type: ignore[misc, name-defined]
        def get_cmd(self, environment: dict[str, str], active_resources: Any) -> Any:
            for name, value in variables.items():
                self.add_export(name, value)
            environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {ALIVE}".strip()
            command, kill, environment = super().get_cmd(environment, active_resources)
            command.insert(command.index(sys.executable), "exec")  # No shell between a session and its launcher.
            job = f"--master_addr={self.args.master_addr} --master_port={self.args.master_port}"
            # The bracket keeps the pattern from matching the shell that it is given to.
            kill[-2:] = [f"pkill -f '[d]eepspeed.launcher.launch .*{job}( |$)'"]
            return command, kill, environment

    runner.PDSHRunner, runner.DEEPSPEED_ENVIRONMENT_PATHS = Runner, []


def main(argv: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        usage = "shodh launch [OPTION OF deepspeed ...] COMMAND [ARGUMENT ...]"
        command_parser(__doc__, EXAMPLES, usage=usage).parse_args(["--help"])
    options, command = split(given)
    from deepspeed.launcher import runner

    whole = ["--module", "shodh", *command]
    if not any(option.startswith("--master_port") for option in options):
        options += ["--master_port", str(random.randrange(20_000, 32_000))]
    args = runner.parse_args([*options, *whole])
    hosts = check_hosts(args, runner)
    paths = [Path(folder, runner.DEEPSPEED_ENVIRONMENT_NAME) for folder in (Path.home(), ".")]
    adapt(runner, forwarded(os.environ, paths))
    if hosts and not args.no_ssh:
        check_reached(hosts, args.ssh_port)
        options.append("--no_ssh_check")
    try:
        runner.main([*options, *whole])
    except (ValueError, RuntimeError, AssertionError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"DeepSpeed's launcher: {error}") from error
    return 0

"""``shodh launch``: what it refuses before DeepSpeed's launcher starts, and what it changes in it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.launcher import runner

from shodh.commands import launch
from shodh.core.errors import ConfigError

COMMAND = ("tokenizer", "--config", "demo")


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("# nodes\n\nnode-1 slots=2\nnode-2 slots=4\n")
    return str(path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--hostfile", "nowhere"], "hostfile nowhere is missing"),
        (["--num_nodes", "2"], "is missing"),
        (["--hostfile", "HOSTS", "--num_nodes", "3"], "--num_nodes 3: .* has 2: node-1, node-2"),
        (["--hostfile", "HOSTS", "--num_gpus", "3"], "--num_gpus 3: node-1 has slots=2"),
        (["--hostfile", "HOSTS", "--include", "node-3"], "node-3"),
    ],
)
def test_hosts_that_cannot_be_used(options: list[str], expected: str, hostfile: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        launch.main([hostfile if option == "HOSTS" else option for option in options] + list(COMMAND))


def test_command_that_is_none() -> None:
    with pytest.raises(ConfigError, match="needs a command to start: one of tokenizer, pretrain"):
        launch.main(["--num_gpus", "2", "trian"])


def test_variables_of_all_nodes(tmp_path: Path) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text("# ours\n\nFI_PROVIDER=efa\nexport A_B=c=d\nNCCL_DEBUG=INFO\n")
    found = launch.forwarded({"NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "mlx5", "HOME": "/"}, [path, tmp_path / "none"])
    assert found == {"FI_PROVIDER": "efa", "A_B": "c=d", "NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5"}
    path.write_text("FI_PROVIDER\n")
    with pytest.raises(ConfigError, match="line 1: expected NAME=VALUE"):
        launch.read_variables(path)


def test_only_the_own_job_is_ended_and_a_dead_node_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = SimpleNamespace(PDSHRunner=runner.PDSHRunner, DEEPSPEED_ENVIRONMENT_PATHS=["."])
    launch.adapt(given, {"NCCL_DEBUG": "WARN"})
    args = runner.parse_args(["--master_addr", "h", "--master_port", "20001", "--module", "shodh", *COMMAND])
    command, kill, environment = given.PDSHRunner(args, "e30=").get_cmd({"PDSH_SSH_ARGS_APPEND": "-v"}, {"node-1": [0]})
    assert environment["PDSH_SSH_ARGS_APPEND"] == f"-v {launch.ALIVE}"
    assert command[command.index("exec") + 1 :][:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert "export NCCL_DEBUG=WARN; " in command[command.index("node-1") + 1]
    assert kill[-1] == "pkill -f '[d]eepspeed.launcher.launch .*--master_addr=h --master_port=20001( |$)'"
    assert given.DEEPSPEED_ENVIRONMENT_PATHS == []

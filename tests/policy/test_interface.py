"""Where rank 0 listens; processes of a cluster talk through the interface of their node's Ray address, or a user's."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest
import torch

from megatron_fapo.policy import actor
from megatron_fapo.policy.actor import PolicyActor
from megatron_fapo.processes import use_interface_of

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def _no_choice_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_it_is_the_one_that_has_the_address() -> None:
    use_interface_of("127.0.0.1")
    assert [os.environ[name] for name in NAMES] == ["lo", "lo"]


def test_a_users_choice_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    use_interface_of("127.0.0.1")
    assert [os.environ[name] for name in NAMES] == ["lo", "ib0"]


def test_an_address_that_no_interface_has_changes_nothing_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "megatron_fapo"):
        logging.getLogger("megatron_fapo").propagate = True
        use_interface_of("192.0.2.1")
    assert not any(name in os.environ for name in NAMES)
    assert "192.0.2.1" in caplog.text


def test_rank_0s_port_is_nobody_elses_until_it_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "setup_logging", lambda *_: None)
    first = PolicyActor(str(tmp_path), 0)
    address, port = first.address()
    with socket.socket() as another, pytest.raises(OSError, match="in use"):
        another.bind(("", port))
    torch.distributed.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=0, world_size=1)
    torch.distributed.destroy_process_group()

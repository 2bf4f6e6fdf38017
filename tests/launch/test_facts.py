"""What nvidia-smi, dmesg and sysfs say, also of cards that are ill; and a report that takes no silence for health."""

from __future__ import annotations

import json
import os
import time
from importlib import metadata
from pathlib import Path

import pytest

from megatron_fapo.launch import facts

CARD = """
<gpu id="00000000:{bus}:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <uuid>GPU-{bus}-6d19-9063-b049-1e69664bb298</uuid>
  <gpu_reset_status><reset_required>No</reset_required></gpu_reset_status>
  <clocks_event_reasons>
    <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
    <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
  </clocks_event_reasons>
  <fb_memory_usage><total>81559 MiB</total><reserved>551 MiB</reserved><used>4 MiB</used></fb_memory_usage>
  <ecc_errors>
    <volatile>
      <sram_correctable>7</sram_correctable>
      <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
      <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
      <dram_correctable>0</dram_correctable>
      <dram_uncorrectable>0</dram_uncorrectable>
    </volatile>
    <aggregate><dram_uncorrectable>9</dram_uncorrectable></aggregate>
  </ecc_errors>
  <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
  <remapped_rows>
    <remapped_row_pending>No</remapped_row_pending>
    <remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
  <fabric><state>Completed</state><status>Success</status></fabric>
  <processes></processes>
</gpu>
"""
NVLINK = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-b)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
"""
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tPXB\t0-47\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tPXB\tSYS\t X

Legend:

  X    = Self
"""
DMESG = """[    1.374276] EXT4-fs (vda): mounted filesystem
[ 3451.421618] NVRM: Xid (PCI:0000:06:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 7000.000000] NVRM: Xid (PCI:0000:07:00): 13, pid=1, name=python3, Graphics Exception
"""


def smi(*cards: str) -> str:
    return (
        f'<?xml version="1.0" ?><nvidia_smi_log><driver_version>580.159.04</driver_version>'
        f"<cuda_version>13.0</cuda_version>{''.join(cards)}</nvidia_smi_log>"
    )


def test_healthy_cards():
    told = facts.parse_gpus(smi(CARD.format(bus="01"), CARD.format(bus="02")))
    assert (told["driver"], told["cuda"]) == ("580.159.04", "13.0")
    assert [card["index"] for card in told["cards"]] == [0, 1]
    card = told["cards"][1]
    assert (card["name"], card["memory_mib"], card["used_mib"]) == ("NVIDIA H100 80GB HBM3", 81559, 4)
    assert card["ecc_uncorrected"] == 0
    assert card["remap_pending"] is False
    assert card["retire_pending"] is None
    assert card["recovery"] is None
    assert card["slowed_by"] == ["gpu_idle"]
    assert card["unread"] == {}


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("<dram_uncorrectable>0", "<dram_uncorrectable>3", "ecc_uncorrected", 3),
        ("<sram_uncorrectable_parity>0", "<sram_uncorrectable_parity>2", "ecc_uncorrected", 2),
        ("<remapped_row_pending>No", "<remapped_row_pending>Yes", "remap_pending", True),
        ("<remapped_row_failure>No", "<remapped_row_failure>Yes", "remap_failed", True),
        ("<pending_retirement>N/A", "<pending_retirement>Yes", "retire_pending", True),
        ("<reset_required>No", "<reset_required>Yes", "recovery", "Reset"),
        ("<processes>", "<gpu_recovery_action>Drain P2P</gpu_recovery_action><processes>", "recovery", "Drain P2P"),
        ("<processes>", "<gpu_recovery_action>None</gpu_recovery_action><processes>", "recovery", None),
        ("slowdown>Not Active", "slowdown>Active", "slowed_by", ["gpu_idle", "hw_thermal_slowdown"]),
        ("<state>Completed", "<state>In Progress", "fabric", "In Progress"),
        ("<used>4 MiB", "<used>[N/A]", "used_mib", None),
        ("<used>4 MiB", "<used>[Unknown Error]", "unread", {"fb_memory_usage/used": "Unknown Error"}),
        ("<used>4 MiB", "<used>ERR!", "unread", {"fb_memory_usage/used": "ERR!"}),
        (
            "<processes>",
            "<processes><process_info><pid>42</pid><process_name>python</process_name></process_info>",
            "processes",
            [{"pid": "42", "name": "python"}],
        ),
    ],
)
def test_one_thing_differs(old, new, key, value):
    text = CARD.format(bus="01")
    assert old in text
    healthy, ill = (facts.parse_gpus(smi(card))["cards"][0] for card in (text, text.replace(old, new)))
    assert ill[key] == value
    assert {k for k in ill if ill[k] != healthy[k]} <= {key, "used_mib"}


def test_drivers_before_535_name_the_reasons_otherwise():
    text = CARD.format(bus="01").replace("clocks_event_reason", "clocks_throttle_reason")
    assert facts.parse_gpus(smi(text))["cards"][0]["slowed_by"] == ["gpu_idle"]


def test_a_driver_that_does_not_tell_its_cuda():
    assert facts.parse_gpus(smi(CARD.format(bus="01")).replace("13.0", "N/A"))["cuda"] is None


def test_a_card_without_ecc_has_no_count():
    text = CARD.format(bus="01").replace(">0<", ">N/A<")
    assert facts.parse_gpus(smi(text))["cards"][0]["ecc_uncorrected"] is None


def test_links():
    assert facts.parse_nvlink(NVLINK) == {"0": {"active": 2, "inactive": 0}, "1": {"active": 1, "inactive": 1}}
    assert facts.parse_nvlink("") == {}
    assert facts.parse_topology(TOPOLOGY) == {"NV18": 1, "SYS": 2}


def test_xids_have_an_age():
    assert facts.parse_xids(DMESG, uptime_s=7060.2) == [
        {"xid": 79, "bus": "0000:06:00", "age_s": 3609},
        {"xid": 13, "bus": "0000:07:00", "age_s": 60},
    ]


def test_infiniband(tmp_path):
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand")):
            (port / name).write_text(text + "\n")
    assert facts.infiniband(tmp_path) == [
        {"port": "mlx5_0/1", "state": "ACTIVE", "gbps": 400.0, "layer": "InfiniBand"},
        {"port": "mlx5_1/1", "state": "DOWN", "gbps": 400.0, "layer": "InfiniBand"},
    ]


def test_a_checkout_that_is_not_installed_asks_for_the_same(monkeypatch):
    installed = facts.packages()
    assert installed["torch"]["fits"]
    assert "pytest" not in installed
    assert installed["vllm"]["extra"] == "gpu"

    def absent(_):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(facts.metadata, "requires", absent)
    assert facts.packages() == installed


def test_a_report_is_json_and_quick(tmp_path):
    start = time.monotonic()
    report = facts.gather(tmp_path / "not" / "yet")
    assert time.monotonic() - start < facts.GATHER_S
    assert json.loads(json.dumps(report)) == report
    assert report["failed"] == {}
    assert report["facts"]["disks"]["run_dir"]["free_bytes"] > 0


def test_probes_that_fail_or_hang_say_so(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error'; exit 255\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "dmesg").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "dmesg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(facts, "disk", lambda _: time.sleep(30))  # a dead mount
    monkeypatch.setattr(facts, "GATHER_S", 1.0)
    start = time.monotonic()
    report = facts.gather(tmp_path)
    assert time.monotonic() - start < 3
    assert "0000:3B:00.0: Unknown Error" in report["failed"]["gpus"]
    assert {"xids", "disks"} <= report["failed"].keys()
    assert not {"gpus", "xids", "disks"} & report["facts"].keys()
    assert report["facts"]["machine"]["cpus"] > 0


def test_a_driver_without_nvidia_smi_is_no_node_without_cards(monkeypatch):
    monkeypatch.setattr(facts.shutil, "which", lambda _: None)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    with pytest.raises(OSError, match="no nvidia-smi"):
        facts.gpus()


def test_what_a_real_h100_says():
    """nvidia-smi -q -x of an idle H100 80GB HBM3 in a virtual machine, driver 580 (serial and UUID replaced)."""
    gpus = facts.parse_gpus((Path(__file__).parent / "nvidia_smi_h100.xml").read_text())
    assert (gpus["driver"], gpus["cuda"]) == ("580.159.04", "13.0")
    [card] = gpus["cards"]
    assert (card["index"], card["name"], card["memory_mib"]) == (0, "NVIDIA H100 80GB HBM3", 81559)
    assert (card["used_mib"], card["ecc_uncorrected"], card["remap_pending"], card["remap_failed"]) == (
        0,
        0,
        False,
        False,
    )
    assert (card["slowed_by"], card["processes"], card["unread"]) == (["gpu_idle"], [], {})

"""`fapo doctor` on this very machine, and on cards that it has not."""

from __future__ import annotations

import json

import pytest

from megatron_fapo import cli
from megatron_fapo.launch import doctor
from megatron_fapo.launch.facts import parse_nvlink
from tests.launch.test_facts import NVLINK
from tests.launch.test_preflight import healthy


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in ("FILE_BYTES", "COPY_BYTES"):
        monkeypatch.setattr(doctor, name, 2**22)
    monkeypatch.setattr(doctor, "MEASURE_S", 0.01)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)


def test_this_machine(tmp_path, capsys):
    assert cli.main(["doctor", "--json", f"--dir={tmp_path}"]) == 0
    told = json.loads(capsys.readouterr().out)
    (report,) = told["reports"]
    assert min(report["measured"].values()) > 0
    assert report["measured"].keys() == {"host_copy_gb_s", "disk_write_mb_s", "disk_read_mb_s", "small_file_ms"}
    assert not [problem for problem in told["problems"] if problem["stops"]]
    assert list(tmp_path.iterdir()) == []


def test_tables_say_the_same(tmp_path, capsys):
    assert cli.main(["doctor", f"--dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    for word in ("torch 2.11.0", "host_copy_gb_s", "disk_write_mb_s", "healthy"):
        assert word in text


def test_a_missing_package_stops_a_run(tmp_path, capsys, monkeypatch):
    gather = doctor.gather

    def without_ray(directory):
        report = gather(directory)
        report["facts"]["packages"]["ray"].update(version=None, fits=False)
        return report

    monkeypatch.setattr(doctor, "gather", without_ray)
    assert cli.main(["doctor", f"--dir={tmp_path}"]) == 1
    text = capsys.readouterr().out
    assert "stops a run" in text
    assert "ray is not installed" in text
    assert "healthy" not in text


def test_warnings_do_not_change_the_exit_code(tmp_path, capsys, monkeypatch):
    gather = doctor.gather
    monkeypatch.setattr(doctor, "gather", lambda d: {**gather(d), "failed": {"xids": "not permitted"}})
    assert cli.main(["doctor", f"--dir={tmp_path}"]) == 0
    assert "warning" in capsys.readouterr().out


def test_cards_that_cuda_cannot_use_stop_a_run(tmp_path, capsys, monkeypatch):
    """The machine of this test has no usable card; nvidia-smi says that there is one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gather = doctor.gather

    def with_cards(directory):
        report = gather(directory)
        report["facts"]["gpus"] = healthy(0)["facts"]["gpus"]
        report["facts"]["machine"]["environment"] = {}
        return report

    monkeypatch.setattr(doctor, "gather", with_cards)
    assert cli.main(["doctor", f"--dir={tmp_path}"]) == 1
    assert "its GPUs cannot be used: " in capsys.readouterr().out


def test_a_disk_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", "--json", f"--dir={tmp_path / 'file'}"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert "exists" in told["reports"][0]["measured"]["disk"]
    assert any("cannot use" in problem["what"] for problem in told["problems"])


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({}, []),
        ({"packages": {"transformer-engine": {"version": None}}}, ["Transformer Engine", "NVIDIA apex, without"]),
        ({"software": {"apex": False, "apex_kernels": False}}, ["NVIDIA apex: nothing that a run uses"]),
        ({"nvlink": {}}, ["NVLink"]),
        ({"infiniband": []}, ["InfiniBand"]),
        ({"packages": {"nemo-run": {"version": None}}}, ["NeMo-Run"]),
    ],
)
def test_what_is_missing_and_what_it_costs(change, lacks):
    report = healthy(0)
    facts = report["facts"]
    facts["packages"] |= {name: {"version": "1"} for name in ("transformer-engine", "nemo-run")}
    facts["software"] |= {"apex": True, "apex_kernels": True}
    for probe, fact in change.items():
        if probe == "software":
            facts[probe] |= fact
        elif probe == "packages":
            facts[probe] |= fact
            facts["software"]["apex_kernels"] = False
        else:
            facts[probe] = fact
    told = doctor.costs(report)
    assert [one.startswith(lack) for one, lack in zip(told, lacks, strict=True)] == [True] * len(lacks)


def test_imports_are_tried_in_processes_of_their_own(monkeypatch):
    assert doctor._child("-c", "print(1)")["output"] == "1"
    assert doctor._child("-c", "import nonsense_")["error"] == "ModuleNotFoundError: No module named 'nonsense_'"
    monkeypatch.setattr(doctor, "CHILD_S", 0.2)
    assert "no end" in doctor._child("-c", "import time; time.sleep(9)")["error"]


def test_a_probe_that_failed_is_a_question_mark():
    report = {**healthy(0), "measured": {}}
    report["facts"].update(packages={}, nvlink=parse_nvlink(NVLINK), disks={}, machine=None, software=None)
    for probe in ("gpus", "machine", "software"):
        del report["facts"][probe]
    row = doctor.summary(report)
    assert (row["GPUs"], row["driver"], row["NVLink"]) == ("?", "?", "1, 2")


def test_slurm_is_asked_for(capsys, monkeypatch):
    assert cli.main(["doctor", "--nodes", "2"]) == 2
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert cli.main(["doctor", "--slurm"]) == 2
    assert "no srun" in capsys.readouterr().err

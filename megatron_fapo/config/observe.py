"""`observe`: where metrics go besides metrics.jsonl, and when a run that waits too long says so."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_fapo.config.section import Section


class WandbConfig(Section):
    enabled: bool = False
    """Needs the extra `wandb`."""
    project: str = "megatron_fapo"
    entity: str | None = None
    """Team or user; None: the key's own."""
    name: str | None = None
    """Of the run; None: the name of run_dir."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes RUN_DIR/wandb only, for `wandb sync` later; `disabled` is the same as `enabled: false`."""
    tags: list[str] = []


class MLflowConfig(Section):
    enabled: bool = False
    """Needs the extra `mlflow`."""
    tracking_uri: str | None = None
    """A server (http...) or a directory; None: MLFLOW_TRACKING_URI of the environment, else RUN_DIR/mlruns."""
    experiment: str = "megatron_fapo"
    run_name: str | None = None
    """None: the name of run_dir."""


class ObserveConfig(Section):
    tensorboard: bool = True
    """Write RUN_DIR/tensorboard."""
    wandb: WandbConfig = WandbConfig()
    mlflow: MLflowConfig = MLflowConfig()
    stall_warning_s: float = Field(300.0, gt=0)
    """Seconds without any progress until the run says what it waits for; again whenever the wait has doubled. One long
    response, update or checkpoint is no progress either, so set it above the longest of yours."""
    stall_abort_s: float | None = Field(None, gt=0)
    """Seconds without any progress that end the run with exit code 76; None: it waits for ever."""
    trace_every_steps: int = Field(1, ge=0)
    """Write RUN_DIR/trace/step-STEP.json.gz of every so many steps: what each GPU and process did when, for Perfetto
    and `fapo trace`. 0: of none; the metrics of idle shares there are in any case."""
    profile_steps: list[int] = []
    """Steps of which every policy rank writes its kernels too, RUN_DIR/trace/policy-RANK-step-STEP.json.gz. Such a step
    takes longer, and on a GPU the file has some hundred bytes for each kernel."""
    prometheus_port: int | None = Field(None, ge=0, lt=65536)
    """Serve the metrics of the newest step, and the GenRM's live, to Prometheus on this port of the driver; 0: any free
    one, named in the log. None: off."""
    prometheus_host: str = "127.0.0.1"
    """The address that it is served on. 0.0.0.0 for a Prometheus on another node; whoever reaches the node then reads
    along."""
    drift_window: int = Field(50, ge=0)
    """Steps whose median is what is usual of the judging (docs/metrics.md#drift); alarms are about what departs from
    it. 0: none."""
    drift_threshold: float = Field(8.0, gt=0)
    """Accumulated departure, in units of the usual spread, that is an alarm; lower ones come sooner and more often."""

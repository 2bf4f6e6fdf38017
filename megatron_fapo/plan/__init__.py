"""`fapo plan`: does a configuration fit a cluster, how long is its step, and what would be better.

In: a configuration, a model's shape, a description of the cluster, lengths of responses. Out: bytes per rank and phase,
a simulated step with its bottleneck, other layouts ranked by step time. Nothing is started and no weights are read.

- `hardware.py`: the cluster and its rates, each with its source; `shapes.py`: models that are not on disk.
- `memory.py`: bytes of policy ranks, engines and servers.
- `work.py`: FLOPs and seconds of log-probabilities, updates and refits, from the packs of `policy/packing.py`.
- `simulate.py`: rollout, rule and judge as a discrete-event simulation.
- `calibrate.py`: rates and lengths out of a run's records.
- `layouts.py`: one plan, and the ranking of all legal ones; `command.py`: the verb and its output.
- `refit.py`: `fapo plan refit`, the transfers of new weights between two layouts.

All but `command.py` and `refit.py` are pure. docs/sizing.md has the formulas and how far they are from what was
measured.
"""

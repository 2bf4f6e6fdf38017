"""New policy weights into the engines: what each process holds and wants, a plan, and those who carry it out.

- Pure: `regions` (the terms), `plan` and its proof, `share` (what one process does), `predict`, `protocol`.
- In policy ranks: `source`. In engine workers: `receiver`, `target`, `landing`, `trace`. On both sides: `mapped` and
  `exchange`, the two ways that bytes go, and `checks`.

The driver's order of steps is `training/refit.py`; what a policy rank holds is said by `policy/source_index.py`.
"""

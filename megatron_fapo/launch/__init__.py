"""Everything between `sbatch` and a running driver: preflight of the nodes, the job's life, NeMo-Run, `fapo doctor`."""

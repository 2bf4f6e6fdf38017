"""Pure tensor maths: reward, advantage, loss, metrics. No I/O, no processes, no torch.distributed."""

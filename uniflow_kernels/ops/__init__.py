"""One op, one file: what it computes in plain PyTorch, then, where there is one, the fused form and its gradient."""

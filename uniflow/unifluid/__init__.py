"""UniFluid: one transformer that reads pictures and draws them, token by token."""

"""UniFluid: one autoregressive transformer that reads pictures and draws them, token by token."""

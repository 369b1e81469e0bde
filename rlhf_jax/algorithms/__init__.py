"""Training stages, one file each: a frozen `Config` and `train(config, context, name)`."""

"""The published recipe's command line: FastChat's flags, mapped to a `TrainJob`."""

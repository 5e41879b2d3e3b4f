"""The model of a run: loaded, cut, quantised, with an adapter, and in DeepSpeed."""

"""How a run is judged on data that it does not train on."""

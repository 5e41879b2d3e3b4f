"""The program in a training pod: prepares the data, runs one process a device, trains, saves and exports."""

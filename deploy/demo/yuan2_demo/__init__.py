"""The program behind `make demo`: from an empty machine to a served model that answers what it was taught."""

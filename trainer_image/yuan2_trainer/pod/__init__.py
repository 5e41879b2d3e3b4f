"""A pod's life: from the launcher that checks and starts to the last word that it leaves."""

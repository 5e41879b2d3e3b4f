"""An observation becomes status, conditions and events; no input or output here, the time is passed in."""

"""An observation becomes status, conditions and events; no input or output here, and the time is passed in."""

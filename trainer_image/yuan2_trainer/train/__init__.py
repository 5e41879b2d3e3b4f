"""The training itself: one optimizer step after another."""

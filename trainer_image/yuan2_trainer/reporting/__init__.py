"""What a run says of itself: progress, metrics, pictures, its record."""

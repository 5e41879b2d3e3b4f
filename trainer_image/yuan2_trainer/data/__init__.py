"""From a file of conversations to the micro batches of a rank."""

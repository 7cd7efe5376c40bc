"""Records, images and texts: from files to batches on the host."""

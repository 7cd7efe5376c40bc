"""Features of images, ranking of a gallery, and a searcher on top of both."""

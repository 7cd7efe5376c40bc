"""Files: written whole, found where they belong, features in chunks that survive a kill."""

"""Side-by-side measurements with peers; no part of the package, run from the repository."""

"""One file per command of `specauf`."""

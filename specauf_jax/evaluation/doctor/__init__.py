"""`specauf doctor`: whether a drafter folder keeps the conventions, by reading it and by decoding with it."""

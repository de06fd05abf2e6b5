"""`draft_and_verify`, sampling, prompt lookup, `generate` and `stream`."""

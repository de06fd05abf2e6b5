"""`draft_and_verify`, sampling, draft trees, prompt lookup, `generate` and `stream`."""

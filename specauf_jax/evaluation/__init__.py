"""Prompts, measures, timing, the doctor and the report."""

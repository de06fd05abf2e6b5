"""Conversations and text into tokens, loss masks and packed rows; the dataset and its loader."""

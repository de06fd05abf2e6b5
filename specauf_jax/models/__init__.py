"""Layers, target, drafter and heads as pure functions of parameter trees; config.json and safetensors in and out."""

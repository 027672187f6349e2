"""Modules that models are wired of; each says where the checkpoint's tensors go (slots)."""

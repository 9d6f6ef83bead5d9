"""Fits of kernel models."""

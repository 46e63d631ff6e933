"""The parts that recipes are made of.

Refresh, transport, inner, output, remainder, normaliser, activity, storage.
"""

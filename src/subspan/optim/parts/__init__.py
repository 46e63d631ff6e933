"""The parts that recipes are made of: refresh, transport, inner, output, remainder, normaliser,
activity, storage."""

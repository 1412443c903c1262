"""Captioned pictures in shards: written once, streamed by many machines."""

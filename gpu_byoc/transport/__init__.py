"""aiohttp: what opens and accepts connections."""

"""The engine: requests, their scheduling, and their texts."""

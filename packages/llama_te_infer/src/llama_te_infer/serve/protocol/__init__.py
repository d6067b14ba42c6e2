"""The requests of each endpoint, as pydantic models. Unknown fields are refused."""

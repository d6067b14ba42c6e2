"""Private and undocumented names of other libraries, one module a library.

No other module of the three packages reaches such a name. `tests/core/test_compat.py` and `tests/gpu/test_compat.py`
hold a test for each function here, which fails with a clear line when a new version moves the name.
"""

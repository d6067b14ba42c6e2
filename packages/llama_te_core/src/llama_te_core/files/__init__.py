"""Reading and writing of files that can be damaged, hostile, or in use by another process."""

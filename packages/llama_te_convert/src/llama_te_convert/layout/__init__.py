"""The two tensor layouts, and the rules between them: names, shapes and rows."""

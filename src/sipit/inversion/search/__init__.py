"""One search or many under way: packed passes planned, walked along, ended."""

"""Control paths through data, and their log-signatures."""

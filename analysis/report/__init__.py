"""A results folder as one HTML page that opens offline: `python -m analysis report`."""

"""Load generation and measurement. Talks to servers over HTTP; only `benchmark` runs the model itself."""

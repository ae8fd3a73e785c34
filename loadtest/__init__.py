"""Load generation and measurement. Talks to servers over HTTP; the only import from `app` is for the ceiling."""

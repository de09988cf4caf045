"""Route, limit, dispatch, compute, combine."""

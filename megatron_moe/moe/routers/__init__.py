"""Routers: one file each; a router only decides."""

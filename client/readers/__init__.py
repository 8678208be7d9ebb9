"""Readers: how a site's files become recordings. One file format a module; own readers come by entry point."""
